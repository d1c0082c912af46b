"""Frames into a GIF, by FFmpeg: one palette for the whole clip."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from .ffmpeg import address

# The palette is made from this many of the first frames, which bounds the memory.
_PALETTE_FRAMES = 64


def write_gif(path: Path, pixels: Iterator[np.ndarray], fps: float) -> None:
    """One palette and ordered dither, so that what is still stays still."""
    import av

    head = list(itertools.islice(pixels, _PALETTE_FRAMES))
    height, width = head[0].shape[:2]
    rate = max(Fraction(fps).limit_denominator(100), Fraction(1, 100))

    with av.open(address(path), "w") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        stream.time_base = 1 / rate
        # The graph has to outlive its filters, or FFmpeg reads freed memory.
        _graph, source, palette_source, sink = _palette_use(width, height, rate)
        palette = _make_palette(head)
        palette.time_base, palette.pts = 1 / rate, 0
        palette_source.push(palette)
        palette_source.push(None)

        def drain() -> None:
            # The filter says "not yet" and "no more" by these two errors.
            with contextlib.suppress(av.BlockingIOError, av.EOFError):
                while True:
                    picture = sink.pull()
                    container.mux(stream.encode(picture))

        for index, frame in enumerate(itertools.chain(head, pixels)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base, picture.pts = 1 / rate, index
            source.push(picture)
            drain()
        source.push(None)
        drain()
        container.mux(stream.encode(None))


def _make_palette(frames: Sequence[np.ndarray]):
    """The 16x16 palette picture of FFmpeg's palettegen for these frames."""
    import av

    height, width = frames[0].shape[:2]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 25))
    maker = graph.add("palettegen", "reserve_transparent=0:stats_mode=full")
    sink = graph.add("buffersink")
    source.link_to(maker)
    maker.link_to(sink)
    graph.configure()
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.time_base, picture.pts = Fraction(1, 25), index
        source.push(picture)
    source.push(None)
    return sink.pull()


def _palette_use(width: int, height: int, rate: Fraction):
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    palette = graph.add_buffer(width=16, height=16, format="bgra", time_base=1 / rate)
    user = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    sink = graph.add("buffersink")
    source.link_to(user, 0, 0)
    palette.link_to(user, 0, 1)
    user.link_to(sink)
    graph.configure()
    return graph, source, palette, sink
