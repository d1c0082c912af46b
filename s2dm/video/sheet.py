"""Contact sheets: clips as one picture, to look at many at a glance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..files import replacing
from .frames import spread, to_uint8


def contact_sheet(
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    gap: int = 2,
):
    """Lay clips out as a grid: one row a clip, time from left to right.

    Args:
        rows: clips of (N, 3, H, W) in [0, 1]; frames may differ in number and size, a cell is as
            large as the largest.
        labels: a short text for each row, written at its left.
        columns: show at most this many frames of each clip, spread evenly over it.
        gap: pixels between the cells.

    Returns:
        A `PIL.Image.Image` in RGB.

    Raises:
        ValueError: no rows, a row that is not (N, 3, H, W) with N >= 1, or a wrong number of
            labels.
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
    picked = [row[spread(len(row), min(columns or len(row), len(row)))] for row in rows]
    cell_height = max(row.shape[-2] for row in picked) + gap
    cell_width = max(row.shape[-1] for row in picked) + gap
    font = ImageFont.load_default()
    margin = 0
    if labels is not None:
        margin = 8 + int(max(font.getbbox(line)[2] for text in labels for line in _lines(text)))
    size = (
        margin + max(len(row) for row in picked) * cell_width + gap,
        len(picked) * cell_height + gap,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(picked):
        top = gap + y * cell_height
        if labels is not None:
            draw.multiline_text((4, top + 2), "\n".join(_lines(labels[y])), "black", font=font)
        for x, frame in enumerate(row):
            sheet.paste(Image.fromarray(to_uint8(frame)), (margin + gap + x * cell_width, top))
    return sheet


def write_contact_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
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
