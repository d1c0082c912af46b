"""The colours of video files: from their Y'CbCr to the RGB of a screen.

FFmpeg's scale filter converts, so the colours are those of the programs that are built on it. It
has to be told what a file leaves out, and knows neither HDR nor wide gamuts: those are `hdr`'s.
The numbers are those of ITU-T H.273, which files and FFmpeg use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .ffmpeg import FilterChain
from .frames import VideoError
from .hdr import needs_conversion, to_srgb

if TYPE_CHECKING:
    import av

BT601, BT709 = 6, 1
"""Matrices of Y'CbCr; BT.709 is the number of its primaries and of its transfer, too."""
LIMITED, FULL = 1, 2
"""Ranges of Y'CbCr, by FFmpeg's numbers."""

_UNSPECIFIED = (2, 3)  # the second is reserved
_MATRICES = {BT709, 4, 5, BT601, 7, 9}  # those that the scale filter converts
_TRANSFERS = {*range(8), *range(11, 17), 18}  # those of screens and of HDR
_NAMES = {
    "transfer characteristic": {
        **{8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428-1"},
        256: "V-Log",
    },
    "colour matrix": {
        **{8: "YCgCo", 10: "BT.2020 constant luminance", 11: "SMPTE ST 2085", 14: "ICtCp"},
    },
}


def matrix_by_size(width: int, height: int) -> int:
    """The matrix where a file names none, by the custom of players: HD has that of BT.709."""
    return BT709 if height >= 720 or width >= 1280 else BT601


class ScreenColours:
    """Turns the frames of a video, which may change their size, into RGB for a screen.

    Args:
        path: of the video, for messages.
        stream: of which the first frame has been decoded.
        first: that frame.

    Raises:
        VideoError: the file's colours are of a kind that isn't known here; it is named.
    """

    def __init__(self, path: Path, stream: av.VideoStream, first: av.VideoFrame) -> None:
        context = stream.codec_context
        self._path = path
        self._transfer, self._primaries = context.color_trc, context.color_primaries
        if self._transfer not in _TRANSFERS:
            raise self._refusal("transfer characteristic", self._transfer)
        if self._transfer in _UNSPECIFIED and first.side_data.get("DOVI_METADATA"):
            raise VideoError(
                f"{path} is Dolby Vision that no other screen can show (profile 5). Export it as "
                "SDR, or as HDR with PQ or HLG."
            )
        self._wide = needs_conversion(self._transfer, self._primaries)
        self._chain, self._kind = None, None

    def __call__(self, frame: av.VideoFrame, width: int) -> np.ndarray:
        """A frame as (H, width, 3) uint8."""
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, width)
        if kind != self._kind:
            self._chain, self._kind = self._build(frame, width), kind
        rgb = self._chain(frame).to_ndarray()
        if rgb.dtype == np.uint8:
            return rgb
        if not self._wide:
            return (rgb >> 8).astype(np.uint8)
        # FFmpeg makes of Y'CbCr of limited range 16 bits with this white.
        limited = frame.color_range != FULL and not frame.format.is_rgb
        return to_srgb(rgb, 255 << 8 if limited else 0xFFFF, self._transfer, self._primaries)

    def _build(self, frame: av.VideoFrame, width: int) -> FilterChain:
        # The filter shall convert nothing else, nor refuse what it doesn't know.
        tags = "color_primaries=unknown:color_trc=unknown"
        pixels = frame.format
        if len(pixels.components) >= 3 and not pixels.is_rgb:
            matrix = frame.colorspace
            if matrix in _UNSPECIFIED:
                matrix = matrix_by_size(frame.width, frame.height)
                tags += f":colorspace={matrix}"
            if matrix not in _MATRICES:
                raise self._refusal("colour matrix", matrix)
        deep = self._wide or frame.format.components[0].bits > 8
        return FilterChain(
            *(frame.width, frame.height, frame.format.name),
            ("setparams", tags),
            ("scale", f"{width}:{frame.height}:flags=bicubic"),
            ("format", "rgb48le" if deep else "rgb24"),
        )

    def _refusal(self, what: str, number: int) -> VideoError:
        name = _NAMES[what].get(number, f"number {number}")
        return VideoError(
            f"{self._path} has a {what} that isn't made for screens ({name}). Convert it to an "
            "ordinary video (BT.709)."
        )
