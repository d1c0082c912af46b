"""Clips into files: videos, GIFs, and folders of PNG frames."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from ..files import replacing, replacing_folder
from .frames import DEFAULT_FPS, VideoError, size_text, to_uint8
from .gif import write_gif
from .mp4 import write_mp4

WRITABLE_SUFFIXES = (".mp4", ".mov", ".mkv", ".gif")


def write_clip(
    path: str | os.PathLike[str], frames: Tensor | Iterable[Tensor], fps: float = DEFAULT_FPS
) -> Path:
    """Write frames to a video file, a GIF or a folder of PNG images.

    Args:
        path: the ending decides: `.mp4`, `.mov`, `.mkv` (H.264 in yuv420p; another codec where
            the FFmpeg at hand lacks it), `.gif`, or no ending for a folder of `frame_00001.png`
            and so on. An existing file is replaced; an existing folder only if it holds nothing
            but such frames.
        frames: (N, 3, H, W), or any iterable (a generator, too) of (3, H, W), float in [0, 1].
            H.264 wants even sizes: an odd last row or column is repeated.
        fps: frames a second.

    Returns:
        The path that was written.

    Raises:
        VideoError: unknown ending, no frames, or a frame of a wrong shape or size.
    """
    path = Path(path)
    check_clip_path(path)
    if not 0 < fps < math.inf:
        raise VideoError(f"Expected a positive frame rate, got {fps}.")
    suffix = path.suffix.lower()
    pixels = _iter_checked(frames)
    if not suffix:
        _write_folder(path, pixels)
        return path
    with replacing(path) as temporary:
        if suffix == ".gif":
            write_gif(temporary, pixels, fps)
        else:
            write_mp4(temporary, pixels, fps)
    return path


def check_clip_path(path: Path) -> None:
    """Raise a VideoError where `write_clip` can't write: a clip takes long to make."""
    suffix = path.suffix.lower()
    if suffix and suffix not in WRITABLE_SUFFIXES:
        raise VideoError(
            f"Can't write a clip to {path}. Give a name that ends in "
            f"{', '.join(WRITABLE_SUFFIXES)}, or one without an ending for a folder of PNG frames."
        )
    nearest = next((parent for parent in path.parents if parent.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise VideoError(f"{nearest} is a file; a clip can't be written in it.")
    if suffix and path.is_dir():
        raise VideoError(f"{path} is a folder; a clip can't be written there.")
    if suffix or not path.exists():
        return
    if not path.is_dir():
        raise VideoError(f"{path} is a file; a folder of frames can't be written there.")
    foreign = [p.name for p in path.iterdir() if not _is_our_frame(p.name)]
    if foreign:
        raise VideoError(
            f"The folder {path} holds other files ({foreign[0]}). Give a new or an empty "
            "folder, so that nothing of yours is replaced."
        )


def _iter_checked(frames: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 arrays; raise on no frames, a wrong shape or a changed size."""
    first: Tensor | None = None
    for index, frame in enumerate(frames, start=1):
        if not isinstance(frame, Tensor) or frame.ndim != 3 or frame.shape[0] != 3:
            got = tuple(frame.shape) if isinstance(frame, Tensor) else type(frame).__name__
            raise VideoError(f"Frame {index}: expected a (3, H, W) tensor, got {got}.")
        if first is None:
            first = frame
        elif frame.shape != first.shape:
            raise VideoError(
                f"Frame {index} is {size_text(frame)}, but the first one is "
                f"{size_text(first)}. All frames of a clip have one size."
            )
        yield to_uint8(frame)
    if first is None:
        raise VideoError("There are no frames to write.")


def _write_folder(folder: Path, pixels: Iterator[np.ndarray]) -> None:
    from PIL import Image

    with replacing_folder(folder) as temporary:
        for index, frame in enumerate(pixels, start=1):
            Image.fromarray(frame).save(temporary / f"frame_{index:05d}.png")


def _is_our_frame(name: str) -> bool:
    return name.startswith("frame_") and name.endswith(".png") and name[6:-4].isdigit()
