"""Pictures and animated pictures, by Pillow: PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .formats import IMAGE_SUFFIXES
from .frames import DEFAULT_FPS, Moment, VideoError
from .hdr import HLG, PQ

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")  # other files of several pictures have no time

# Where formats keep the transfer characteristic of H.273, at the beginning of the file: so many
# bytes after this mark.
_TRANSFER_AFTER = {"PNG": (b"cICP", 1), "AVIF": (b"colrnclx", 3)}
_HEAD = 1 << 14

# Browsers and FFmpeg show a frame this long that asks for no time, or for hardly any.
_SHORTEST, _INSTEAD = 10, 100  # milliseconds


class Pictures:
    """The frames of a picture file: one, or those of an animation at their times.

    Raises:
        VideoError: when it is read, and it can't be; or it holds pages, which have no time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def moments(self) -> Iterator[Moment]:
        for start, _, image in self._shown():
            yield Moment(start / 1000, partial(self._pixels, image))

    def rate(self) -> float:
        """Frames a second in the mean; `DEFAULT_FPS` of a picture that stands still."""
        durations = [duration for _, duration, _ in self._shown()]
        return 1000 * len(durations) / sum(durations) if len(durations) > 1 else DEFAULT_FPS

    def _pixels(self, image: Image.Image) -> np.ndarray:
        with _naming(self._path):
            return image_pixels(image)

    def _shown(self) -> Iterator[tuple[float, float, Image.Image]]:
        """Start and duration in milliseconds, and the picture, good until the next one."""
        with _opened(self._path) as image:
            _refuse_others(self._path, image)
            count = image.n_frames if is_moving(image) else 1
            # An animated PNG may carry a picture for readers that know no animation.
            first = 1 if count > 1 and image.info.get("default_image") else 0
            start = 0.0
            for number in range(first, count):
                image.seek(number)
                image.load()  # only then some formats know the duration
                duration = image.info.get("duration") or 0
                duration = duration if duration > _SHORTEST else _INSTEAD
                yield start, duration, image
                start += duration


def is_picture(path: Path) -> bool:
    """Whether a file is for Pillow to read: by what it holds; a broken one by its ending."""
    from PIL import Image

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with _naming(path), Image.open(path, formats=formats):
            return True
    except VideoError:
        return path.suffix.lower() in IMAGE_SUFFIXES


def is_animation(path: Path) -> bool:
    """Whether a file holds a picture that moves."""
    try:
        with _opened(path) as image:
            return is_moving(image)
    except VideoError:  # is for the reader to say
        return False


def is_moving(image: Image.Image) -> bool:
    """Whether a PIL image is an animation: the pages of a TIFF and the second picture in the
    JPEGs of phones are none."""
    return image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1


def picture_pixels(file: Path, still: bool = False) -> np.ndarray:
    """A picture file as (H, W, 3) uint8, the first frame of an animation.

    Args:
        file: the picture.
        still: refuse an animation.
    """
    with _opened(file) as image:
        if still and is_moving(image):
            raise VideoError(
                f"{file} is an animation of {image.n_frames} frames in a folder of pictures. "
                "Give the file itself as the clip, or take it out of the folder."
            )
        _refuse_others(file, image)
        return image_pixels(image)


def image_pixels(image: Image.Image) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8, upright however the camera was held; no transparency."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _refuse_others(file: Path, image: Image.Image) -> None:
    """Raise on what Pillow reads as it is, though it is no picture for a screen."""
    if image.format == "TIFF" and image.n_frames > 1:
        raise VideoError(
            f"{file} holds {image.n_frames} pages, which nothing says to be frames in time. Save "
            "them as a folder of pictures or as a video."
        )
    if image.format in _TRANSFER_AFTER:
        mark, distance = _TRANSFER_AFTER[image.format]
        with file.open("rb") as content:
            head = content.read(_HEAD)
        place = head.find(mark)
        transfer = head[place + len(mark) + distance] if 0 <= place < len(head) - 16 else None
        if transfer in (PQ, HLG):
            name = "PQ" if transfer == PQ else "HLG"
            raise VideoError(
                f"{file} is a picture of high dynamic range ({name}), which can only be read of "
                "videos. Save it for an ordinary screen (sRGB)."
            )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    from PIL import Image

    with _naming(file), Image.open(file) as image:
        yield image


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Say of which file it is that Pillow raises something."""
    from PIL import Image

    try:
        yield
    except VideoError:
        raise
    # All of these come out of Pillow's readers where a file is damaged.
    except (
        *(OSError, EOFError, SyntaxError, ValueError, TypeError, RuntimeError),
        *(LookupError, ArithmeticError, struct.error, Image.DecompressionBombError),
    ) as error:
        hint = " AVIF wants Pillow 11.3 or newer." if file.suffix.lower() == ".avif" else ""
        raise VideoError(f"{file} is not an image that can be read: {error}.{hint}") from error
