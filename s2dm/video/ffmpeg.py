"""FFmpeg's names of files, and its filters in a row."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av


def address(path: Path) -> str:
    """A local file as FFmpeg takes it for nothing else: `take:1.mp4` would be a protocol."""
    return "file:" + os.fspath(path)


class FilterChain:
    """Filters in a row, through which frames of one size and format go one by one.

    Args:
        width, height: of the frames, in pixels.
        pixel_format: of the frames, in FFmpeg's words.
        filters: names with their options, also in FFmpeg's words.
    """

    def __init__(
        self, width: int, height: int, pixel_format: str, *filters: tuple[str, str]
    ) -> None:
        import av

        # The graph has to outlive its filters, or FFmpeg reads freed memory.
        self._graph = av.filter.Graph()
        self._source = self._graph.add_buffer(
            width=width, height=height, format=pixel_format, time_base=Fraction(1, 1000)
        )
        self._sink = self._graph.add("buffersink")
        middle = [self._graph.add(name, options) for name, options in filters]
        self._graph.link_nodes(self._source, *middle, self._sink)
        self._graph.configure()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        self._source.push(frame)
        return self._sink.pull()
