"""Regions as cells of one fine grid, so that all layers agree on who owns what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .state import Array, Mask, Polygon

_FINE, _FINE_SIDE = 3, 1024  # cells per pixel and axis, up to this side of the picture


def cells_per_pixel(width: int, height: int) -> int:
    """Outlines are kept finer than pixels: a pixel of a moved layer lies between those of frame 1.

    It is an odd number, so that a pixel's centre is the centre of a cell.
    """
    return _FINE if max(width, height) <= _FINE_SIDE else 1


@dataclass(frozen=True, eq=False)
class Cells:
    """A part of the fine grid: (h,w) bool from the cell (left, top) on."""

    cells: Array
    left: int
    top: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the whole grid."""
        height, width = self.cells.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def rasterise(region: Polygon | Mask, width: int, height: int) -> Cells | None:
    """A region of a width x height picture on the fine grid; None if it is empty."""
    fine = cells_per_pixel(width, height)
    if isinstance(region, Polygon):
        return _fill((region.corners + 0.5) * fine, width * fine, height * fine)
    rows, columns = (
        ((np.arange(side * fine) + 0.5) * count / (side * fine)).astype(int)
        for side, count in zip((height, width), region.cells.shape, strict=True)
    )
    return _cropped(Cells(region.cells[rows[:, None], columns[None, :]], 0, 0))


def _cropped(grid: Cells) -> Cells | None:
    used = [np.flatnonzero(grid.cells.any(axis)) for axis in (0, 1)]
    if not len(used[0]):
        return None
    (left, right), (top, bottom) = ((int(side[0]), int(side[-1]) + 1) for side in used)
    cells = grid.cells[top:bottom, left:right].copy()
    return Cells(cells, grid.left + left, grid.top + top)


def _fill(corners: Array, width: int, height: int) -> Cells | None:
    """Cells whose centre has a winding number other than 0; cell k reaches from k to k + 1."""
    if not len(corners):
        return None
    limit = (width, height)
    left, top = np.clip(np.floor(corners.min(axis=0)), 0, limit).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(axis=0)), 0, limit).astype(int).tolist()
    corners = corners - (left, top)
    width, height = right - left, bottom - top
    winding = np.zeros((height, width + 1), np.int32)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        low, high = sorted((y0, y1))
        # Rows whose centre lies in [low, high): a corner between two edges counts once.
        first, last = (int(np.clip(np.ceil(y - 0.5), 0, height)) for y in (low, high))
        if first >= last:
            continue
        rows = np.arange(first, last)
        crossing = x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0)
        columns = np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)
        winding[rows, columns] += 1 if y1 > y0 else -1
    return _cropped(Cells(np.cumsum(winding[:, :-1], axis=1) != 0, left, top))
