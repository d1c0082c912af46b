"""Contact sheets: clips as one picture, to look at many at a glance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from pathlib import Path

from torch import Tensor

from ..files import replacing
from .frames import to_uint8

COLUMNS = 16  # the bundled model's clips in one line


def contact_sheet(
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int = COLUMNS,
    gap: int = 2,
):
    """Lay clips out as a grid: one row a clip, time from left to right.

    Every frame is there: a fault of a single frame must not fall between those that are shown.

    Args:
        rows: clips of (N, 3, H, W) in [0, 1]; frames may differ in number and size, a cell is as
            large as the largest.
        labels: a short text for each row, written at its left.
        columns: frames side by side; a longer clip goes on in the next line.
        gap: pixels between the cells.

    Returns:
        A `PIL.Image.Image` in RGB.

    Raises:
        ValueError: no rows, a row that is not (N, 3, H, W) with N >= 1, a wrong number of labels,
            or no column.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("A contact sheet needs at least one row of frames.")
    for number, row in enumerate(rows, start=1):
        if row.ndim != 4 or row.shape[1] != 3 or row.shape[0] < 1:
            raise ValueError(
                f"Row {number}: expected frames of shape (N, 3, H, W), got {tuple(row.shape)}."
            )
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"Expected {len(rows)} labels, one for each row, got {len(labels)}.")
    if columns < 1:
        raise ValueError(f"Expected at least one column, got {columns}.")
    lines = [line for row in rows for line in row.split(columns)]
    titles = [""] * len(lines)
    if labels is not None:
        starts = accumulate((ceil(len(row) / columns) for row in rows[:-1]), initial=0)
        for start, label in zip(starts, labels, strict=True):
            titles[start] = label
    cell_height = max(row.shape[-2] for row in rows) + gap
    cell_width = max(row.shape[-1] for row in rows) + gap
    font = ImageFont.load_default()
    margin = 0
    if labels is not None:
        margin = 8 + int(max(font.getbbox(line)[2] for text in labels for line in _lines(text)))
    size = (
        margin + max(len(line) for line in lines) * cell_width + gap,
        len(lines) * cell_height + gap,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, (line, title) in enumerate(zip(lines, titles, strict=True)):
        top = gap + y * cell_height
        draw.multiline_text((4, top + 2), "\n".join(_lines(title)), "black", font=font)
        for x, frame in enumerate(line):
            sheet.paste(Image.fromarray(to_uint8(frame)), (margin + gap + x * cell_width, top))
    return sheet


def write_contact_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int = COLUMNS,
) -> Path:
    """Write `contact_sheet` to an image file (PNG, JPEG or what Pillow knows by the ending)."""
    path = Path(path)
    sheet = contact_sheet(rows, labels, columns)
    with replacing(path) as temporary:
        sheet.save(temporary)
    return path


def _lines(text: str) -> list[str]:
    """A label in at most three lines, so that a caption doesn't widen the sheet."""
    import textwrap

    return textwrap.wrap(text, 26, max_lines=3, placeholder="…") or [""]
