"""Frames into an MP4 file (or another container of the same codecs), by FFmpeg."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from .colour import BT601, BT709, LIMITED, matrix_by_size
from .ffmpeg import FilterChain, address
from .frames import VideoError

logger = logging.getLogger(__name__)

# libx264 is missing from some builds of FFmpeg (its licence is GPL); the others play nearly as
# widely, and MPEG-4 part 2 is in every build.
CODECS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"crf": "17", "preset": "medium"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "2"}),
)

_MATRIX_NAMES = {BT709: "bt709", BT601: "smpte170m"}
_EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # right to the rounding


def write_mp4(path: Path, pixels: Iterator[np.ndarray], fps: float) -> None:
    """H.264 in yuv420p where FFmpeg has it; an odd last row or column is repeated.

    The file says what its colours are: the primaries and the transfer of BT.709, which are a
    screen's, limited range, and the matrix of BT.709 for HD, of BT.601 below, so that a player
    that doesn't ask the file and goes by the size shows them right, too.
    """
    import av

    first = next(pixels)
    height, width = (side + side % 2 for side in first.shape[:2])
    matrix = matrix_by_size(width, height)
    to_ycbcr = FilterChain(
        *(width, height, "rgb24"),
        ("scale", f"flags={_EXACT}:out_range=tv:out_color_matrix={_MATRIX_NAMES[matrix]}"),
        ("format", "yuv420p"),
    )
    with av.open(address(path), "w") as container:
        stream, rate = _add_stream(container, fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = BT709
        context.colorspace, context.color_range = matrix, LIMITED
        for index, frame in enumerate(itertools.chain((first,), pixels)):
            odd = [(0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)]
            picture = av.VideoFrame.from_ndarray(np.pad(frame, odd, "edge"), format="rgb24")
            picture = to_ycbcr(picture)
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _add_stream(container, fps: float):
    import av

    rate = max(Fraction(fps).limit_denominator(1000), Fraction(1, 1000))
    for name, options in CODECS:
        if name in av.codecs_available:
            if name != CODECS[0][0]:
                logger.warning("This FFmpeg has no libx264; writing the video with %s.", name)
            return container.add_stream(name, rate=rate, options=dict(options)), rate
    raise VideoError(
        "The FFmpeg that PyAV carries has no codec for MP4 files. Write a .gif or a folder of "
        "PNG frames, or reinstall the package av."
    )
