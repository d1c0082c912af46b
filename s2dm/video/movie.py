"""Video files, by PyAV: decoded, upright, as wide as they are shown."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .colour import ScreenColours
from .ffmpeg import address
from .formats import VIDEO_SUFFIXES
from .frames import DEFAULT_FPS, Moment, VideoError

if TYPE_CHECKING:
    import av

_TURN = math.tan(math.radians(1))  # a display matrix may be off by a degree, as in FFmpeg
_COVER = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC
_STRETCH = 16  # pixels that are more than so many times as wide as high, or as high as wide


class Movie:
    """The frames of a video file at their times.

    Raises:
        VideoError: when it is read, and it can't be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def moments(self) -> Iterator[Moment]:
        with self._opened() as (container, stream):
            stream.thread_type = "AUTO"
            colours = None
            for frame in self._decoded(container, stream):
                colours = colours or ScreenColours(self._path, stream, frame)
                yield Moment(frame.time, partial(self._pixels, stream, colours, frame))

    def rate(self) -> float:
        """Frames a second in the mean, `DEFAULT_FPS` where the file has none."""
        with self._opened() as (_, stream):
            rate = stream.average_rate or stream.guessed_rate
        return float(rate) if rate else DEFAULT_FPS

    def _decoded(self, container, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        import av

        try:
            yield from container.decode(stream)
        except av.FFmpegError as error:
            raise VideoError(
                f"{self._path} can't be decoded: {error}. The file may be cut short: export it "
                "again."
            ) from error

    def _pixels(
        self, stream: av.VideoStream, colours: ScreenColours, frame: av.VideoFrame
    ) -> np.ndarray:
        import av

        shape = stream.sample_aspect_ratio or 1
        if not 1 / _STRETCH <= shape <= _STRETCH:
            raise VideoError(f"{self._path} has pixels that are {shape} times as wide as high.")
        try:
            pixels = colours(frame, max(1, round(frame.width * shape)))
        except av.FFmpegError as error:
            raise VideoError(
                f"{self._path} has pixels ({frame.format.name}) that can't be converted: {error}."
            ) from error
        return self._upright(frame, pixels)

    def _upright(self, frame: av.VideoFrame, pixels: np.ndarray) -> np.ndarray:
        """Turn and mirror pixels as the display matrix of their frame says."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels
        # A pixel at (x, y) is shown at (a x + c y, b x + d y), but for a shift.
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
        if max(abs(b), abs(c)) <= _TURN * min(abs(a), abs(d)):
            across, down = a, d
        elif max(abs(a), abs(d)) <= _TURN * min(abs(b), abs(c)):
            pixels = pixels.swapaxes(0, 1)
            across, down = c, b
        else:
            raise VideoError(
                f"{self._path} is to be shown turned by {math.degrees(math.atan2(b, a)):.0f} "
                "degrees or slanted. Only quarter turns and mirroring can be read: turn it in a "
                "video editor."
            )
        return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])

    @contextlib.contextmanager
    def _opened(self):
        import av

        try:
            _refuse_photos(self._path)
            # Neither a number in the name makes a series of files of it, nor a tag of another
            # encoding an error.
            container = av.open(
                address(self._path),
                container_options={"pattern_type": "none"},
                metadata_errors="replace",
            )
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"{self._path} is not a video that can be read ({error}). Expected a file such as "
                f"{', '.join(VIDEO_SUFFIXES)} or a folder of images."
            ) from error
        with container:
            if not container.streams.video:
                raise VideoError(f"{self._path} has no picture track.")
            yield container, main_stream(container.streams.video)


def main_stream(streams: Sequence[av.VideoStream]) -> av.VideoStream:
    """The first that is a video, not the picture on its cover."""
    return min(streams, key=lambda stream: bool(stream.disposition.value & _COVER))


def _refuse_photos(path: Path) -> None:
    """FFmpeg would read one tile of a photo as a video."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _PHOTOS:
        raise VideoError(
            f"{path} is a photo in HEIC or AVIF that can't be read here (AVIF needs Pillow 11.3 "
            "or newer). Save it as PNG or JPEG."
        )


# Brands of ISO 23008-12, with which such files begin.
_PHOTOS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"}
