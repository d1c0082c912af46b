"""Clips out of files: videos, and folders of pictures."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import in_order, is_left_by_systems
from .formats import IMAGE_SUFFIXES, MOVING_SUFFIXES, VIDEO_SUFFIXES
from .frames import DEFAULT_FPS, Moment, VideoError, cover, from_uint8, size_text, spread
from .movie import Movie
from .pictures import Pictures, is_animation, is_picture, picture_pixels


def iter_frames(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Yield the frames of a video file or of a folder of images, in order.

    Args:
        path: a video that FFmpeg reads, an animated GIF, WebP, PNG or AVIF, or a folder whose
            images (PNG, JPEG, WebP, AVIF, BMP, TIFF) are the frames in the order of their names,
            2 before 10.

    Yields:
        (3, H, W) float32 tensors in [0, 1], as a screen shows them: upright, mirrored where the
        file says so, with square pixels, HDR and wide gamuts mapped to sRGB.

    Raises:
        VideoError: the path is missing, is not a video, holds no frames, or colours or a display
            matrix that can't be shown right.
    """
    path = Path(path)
    empty = True
    for moment in _clip(path).moments():
        empty = False
        yield from_uint8(moment.pixels())
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
    clip = _clip(path)
    fps = clip.rate()
    wanted: list[int] | None = None
    if frames is not None:
        times = [moment.time for moment in clip.moments()]
        wanted, fps = _spread_in_time(path, times, frames, fps)
    fit = None if size is None else lambda frame: cover(frame.unsqueeze(0), *size)[0]
    return _read(path, clip, wanted, fit), fps


def read_frames(
    path: str | os.PathLike[str],
    choose: Callable[[list[float | None]], list[int]],
    fit: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[int]]:
    """Read chosen frames of a clip.

    Args:
        path: see `iter_frames`.
        choose: called with the times of all frames, None where nothing says them; gives the
            numbers of those to take, which may repeat, in rising order.
        fit: what is done with each frame (3, H, W) while reading, such as cropping.

    Returns:
        The frames, (N, 3, H, W) in [0, 1], and their numbers.

    Raises:
        VideoError: see `read_clip`.
    """
    path = Path(path)
    clip = _clip(path)
    times = [moment.time for moment in clip.moments()]
    if not times:
        raise VideoError(f"{path} holds no frames.")
    numbers = choose(times)
    return _read(path, clip, numbers, fit), numbers


def evenly(frames: int) -> Callable[[list[float | None]], list[int]]:
    """For `read_frames`: so many, spread evenly in time from the first to the last."""
    return lambda times: _spread_numbers(times, frames)


def _read(
    path: Path,
    clip: _Folder | Pictures | Movie,
    wanted: list[int] | None,
    fit: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The frames of a clip with these numbers, in order; all for None."""
    kept: list[Tensor] = []
    for index, moment in enumerate(clip.moments()):
        repeats = 1 if wanted is None else wanted.count(index)
        if not repeats:
            continue
        frame = from_uint8(moment.pixels())
        if fit is not None:
            frame = fit(frame)
        if kept and frame.shape != kept[0].shape:
            raise VideoError(
                f"The frames of {path} differ in size: {size_text(kept[0])}, then "
                f"{size_text(frame)}. Give a size to bring them to one."
            )
        kept.extend([frame] * repeats)
    if not kept:
        raise VideoError(f"{path} holds no frames.")
    return torch.stack(kept)


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a picture (3, H, W) in [0, 1], of an animation the first; transparency is dropped.

    Raises:
        VideoError: the path is missing or not an image.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"There is no image at {path}.")
    return from_uint8(picture_pixels(path))


def frame_rate(path: str | os.PathLike[str]) -> float:
    """Frames a second of a clip; `DEFAULT_FPS` for a folder or where the file has none."""
    return _clip(Path(path)).rate()


def is_clip(path: Path) -> bool:
    """Whether a path in a folder of clips is one: a video, an animation, a folder of pictures."""
    if is_left_by_systems(path.name):
        return False
    if path.is_dir():
        return any(not _is_moving(file) for file in _pictures(path))
    return path.suffix.lower() in VIDEO_SUFFIXES or _is_moving(path)


def _is_moving(file: Path) -> bool:
    return file.suffix.lower() in MOVING_SUFFIXES and is_animation(file)


class _Folder:
    """The pictures of a folder as frames, which nothing says the times of."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def moments(self) -> Iterator[Moment]:
        for file in _pictures(self._path):
            yield Moment(None, partial(picture_pixels, file, still=True))

    def rate(self) -> float:
        return DEFAULT_FPS


def _clip(path: Path) -> _Folder | Pictures | Movie:
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise VideoError(f"There is no clip at {path}. Give a video file or a folder of images.")
    return Pictures(path) if is_picture(path) else Movie(path)


def _pictures(folder: Path) -> list[Path]:
    return in_order(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _spread_in_time(
    path: Path, times: list[float | None], frames: int, fps: float
) -> tuple[list[int], float]:
    """Which of the frames to take, shown at `times`, and the frame rate that keeps the duration."""
    total = len(times)
    if total == 0:
        raise VideoError(f"{path} holds no frames.")
    if total == 1:
        return [0] * frames, DEFAULT_FPS  # a picture has no duration to keep
    numbers = _spread_numbers(times, frames)
    if _without_times(times):
        return numbers, fps * frames / total
    rate = (total - 1) / (times[-1] - times[0])
    if math.isclose(rate, fps, rel_tol=0.02):
        rate = fps  # without the rounding of the times
    return numbers, rate * frames / total


def _spread_numbers(times: list[float | None], frames: int) -> list[int]:
    """Numbers of `frames` frames, spread in time where all times are known."""
    total = len(times)
    if total == 1 or _without_times(times):
        return spread(total, frames)
    even = np.linspace(times[0], times[-1], frames)
    places = np.interp(even, times, np.arange(total)).round(6)
    return [round(place) for place in places.tolist()]


def _without_times(times: list[float | None]) -> bool:
    return None in times or any(one >= other for one, other in itertools.pairwise(times))
