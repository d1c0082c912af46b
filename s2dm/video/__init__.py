"""Clips in and out of files: videos, animations and folders of pictures, and contact sheets.

Frames are float32 tensors of shape (3, H, W) with values in [0, 1]. Reading and writing stream:
only the frames in hand are in memory, so the length of a clip is not limited by it. A file is
written under a temporary name and renamed when it is complete, so a broken run leaves no half
file behind. PyAV and Pillow are imported when they are first needed.
"""

from .formats import IMAGE_SUFFIXES, MOVING_SUFFIXES, VIDEO_SUFFIXES
from .frames import DEFAULT_FPS, VideoError, cover, to_uint8
from .read import evenly, frame_rate, is_clip, iter_frames, read_clip, read_frames, read_image
from .sheet import contact_sheet, write_contact_sheet
from .write import WRITABLE_SUFFIXES, check_clip_path, write_clip

__all__ = [
    "DEFAULT_FPS",
    "IMAGE_SUFFIXES",
    "MOVING_SUFFIXES",
    "VIDEO_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "VideoError",
    "check_clip_path",
    "contact_sheet",
    "cover",
    "evenly",
    "frame_rate",
    "is_clip",
    "iter_frames",
    "read_clip",
    "read_frames",
    "read_image",
    "to_uint8",
    "write_clip",
    "write_contact_sheet",
]
