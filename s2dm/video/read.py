"""Clips out of files: videos, and folders of pictures."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..files import in_order
from .frames import DEFAULT_FPS, VideoError, cover, from_uint8, size_text, spread

if TYPE_CHECKING:
    import av
    from PIL import Image

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def iter_frames(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Yield the frames of a video file or of a folder of images, in order.

    Args:
        path: a video that FFmpeg reads, or a folder whose images (PNG, JPEG, WebP, BMP) are the
            frames in the order of their names, 2 before 10.

    Yields:
        (3, H, W) float32 tensors in [0, 1].

    Raises:
        VideoError: the path is missing, is not a video, or holds no frames.
    """
    path = Path(path)
    empty = True
    for pixels in _iter_pixels(path):
        empty = False
        yield from_uint8(pixels)
    if empty:
        raise VideoError(f"{path} holds no frames.")


def read_clip(
    path: str | os.PathLike[str],
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, float]:
    """Read a clip into one tensor.

    Args:
        path: see `iter_frames`.
        frames: how many frames to take, spread evenly in time from the first to the last; all if
            None. A clip with fewer frames repeats some.
        size: (height, width) to which each frame is scaled to cover and cropped at the centre,
            while reading, so that a large video never lies in memory at full size.

    Returns:
        The frames, (N, 3, H, W) in [0, 1], and the frame rate of the result in frames a second
        (the duration of the clip stays the same when `frames` thins it out).

    Raises:
        VideoError: see `iter_frames`; or the frames differ in size.
        ValueError: `frames` or `size` is not positive.
    """
    path = Path(path)
    if frames is not None and frames < 1:
        raise ValueError(f"Expected at least 1 frame, got frames={frames}.")
    if size is not None and min(size) < 1:
        raise ValueError(f"Expected a positive (height, width), got {size}.")
    fps = frame_rate(path)
    wanted: list[int] | None = None
    if frames is not None:
        wanted, fps = _spread_in_time(path, _frame_times(path), frames, fps)
    kept: list[Tensor] = []
    for index, pixels in enumerate(_iter_pixels(path)):
        repeats = 1 if wanted is None else wanted.count(index)
        if not repeats:
            continue
        frame = from_uint8(pixels)
        if size is not None:
            frame = cover(frame.unsqueeze(0), *size)[0]
        if kept and frame.shape != kept[0].shape:
            raise VideoError(
                f"The frames of {path} differ in size: {size_text(kept[0])}, then "
                f"{size_text(frame)}. Give a size to bring them to one."
            )
        kept.extend([frame] * repeats)
    if not kept:
        raise VideoError(f"{path} holds no frames.")
    return torch.stack(kept), fps


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a picture (3, H, W) in [0, 1]; transparency is dropped.

    Raises:
        VideoError: the path is missing or not an image.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"There is no image at {path}.")
    return from_uint8(_read_pixels(path))


def frame_rate(path: str | os.PathLike[str]) -> float:
    """Frames a second of a video file; `DEFAULT_FPS` for a folder or where the file has none."""
    path = Path(path)
    if path.is_dir():
        return DEFAULT_FPS
    with _open_video(path) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else DEFAULT_FPS


def _spread_in_time(
    path: Path, times: list[float | None], frames: int, fps: float
) -> tuple[list[int], float]:
    """Which of the frames to take, shown at `times`, and the frame rate that keeps the duration."""
    total = len(times)
    if total == 0:
        raise VideoError(f"{path} holds no frames.")
    if total == 1:
        return [0] * frames, DEFAULT_FPS  # a picture has no duration to keep
    if None in times or any(one >= other for one, other in itertools.pairwise(times)):
        return spread(total, frames), fps * frames / total
    rate = (total - 1) / (times[-1] - times[0])
    if math.isclose(rate, fps, rel_tol=0.02):
        rate = fps  # without the rounding of the times
    even = np.linspace(times[0], times[-1], frames)
    places = np.interp(even, times, np.arange(total)).round(6)
    return [round(place) for place in places.tolist()], rate * frames / total


def _frame_times(path: Path) -> list[float | None]:
    """When each frame is shown, in seconds, or None where nothing says so."""
    if path.is_dir():
        return [None] * len(_pictures(path))
    return [frame.time for frame in _decode(path)]


def _iter_pixels(path: Path) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 frames."""
    if path.is_dir():
        yield from map(_read_pixels, _pictures(path))
    else:
        yield from map(_upright_pixels, _decode(path))


def _pictures(folder: Path) -> list[Path]:
    return in_order(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _decode(path: Path) -> Iterator[av.VideoFrame]:
    import av

    with _open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        try:
            yield from container.decode(stream)
        except av.FFmpegError as error:
            raise VideoError(
                f"{path} can't be decoded: {error}. The file may be cut short; make it anew."
            ) from error


def _read_pixels(file: Path) -> np.ndarray:
    """An image as (H, W, 3) uint8, upright however the camera was held."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image_pixels(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise VideoError(f"{file} is not an image that can be read: {error}") from error


def image_pixels(image: Image.Image) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8, upright however the camera was held; no transparency."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _upright_pixels(frame: av.VideoFrame) -> np.ndarray:
    """A frame of a video as (H, W, 3) uint8, turned as the file says."""
    quarters = round(frame.rotation / 90)  # counterclockwise
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))


@contextlib.contextmanager
def _open_video(path: Path):
    import av

    if not path.is_file():
        raise VideoError(f"There is no clip at {path}. Give a video file or a folder of images.")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} is not a video that can be read ({error}). Expected a file such as "
            f"{', '.join(VIDEO_SUFFIXES)} or a folder of images."
        ) from error
    with container:
        if not container.streams.video:
            raise VideoError(f"{path} has no picture track.")
        yield container, container.streams.video[0]
