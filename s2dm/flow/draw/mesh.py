"""A sheet of small triangles that is bent, and which pixels each of them comes to lie on."""

from __future__ import annotations

import numpy as np

from .state import Array

_SLACK = 1e-3  # of a cell: pixels on the seam of two triangles belong to one of them
_FLAT = 1e-4  # of its area: a triangle that is pressed further is gone
_LEVEL = 1e-9
_ROUNDS, _MET = 20, 0.005  # held points are met to so many pixels, or as well as so many rounds can
_SHIFT = 0.25  # of a cell: how far its corners are shifted for them
_AT_ONCE = 1 << 19  # rows of triangles that are looked at in one go


class Mesh:
    """Square cells over a part of the picture, each cut into two triangles.

    left, top: the first pixel. columns, rows: number of cells. side: of a cell, in pixels.
    Between vertices all is linear.
    """

    def __init__(self, left: int, top: int, columns: int, rows: int, side: int) -> None:
        self.left, self.top, self.columns, self.rows, self.side = left, top, columns, rows, side
        # Cells begin and end between pixels.
        x = left - 0.5 + side * np.arange(columns + 1)
        y = top - 0.5 + side * np.arange(rows + 1)
        self.vertices = (x[None, :] + 1j * y[:, None]).ravel()
        corner = np.arange((columns + 1) * (rows + 1)).reshape(rows + 1, columns + 1)
        first, right, down, last = (
            part.ravel()
            for part in (corner[:-1, :-1], corner[:-1, 1:], corner[1:, :-1], corner[1:, 1:])
        )
        self._triangles = np.concatenate(
            [np.stack([first, right, down], axis=1), np.stack([last, down, right], axis=1)]
        )
        self._cell = np.tile(np.arange(columns * rows), 2)
        # A corner of each triangle in frame 1, and the two sides that begin there.
        a, b, c = self.vertices[self._triangles.T]
        self._source = np.stack([a, b - a, c - a])
        self._area = (self._source[1].conj() * self._source[2]).imag  # doubled

    def hold(self, points: Array) -> None:
        """Take points (K,) complex of frame 1 for `met`. Those beside the sheet don't count."""
        column = (points.real - self.left + 0.5) / self.side
        row = (points.imag - self.top + 0.5) / self.side
        self._held = np.flatnonzero(
            (column >= 0) & (column < self.columns) & (row >= 0) & (row < self.rows)
        )
        column, row = column[self._held], row[self._held]
        # The corners of the triangle that a point lies in, and what share of it each one is.
        u, v = column % 1, row % 1
        first = row.astype(int) * (self.columns + 1) + column.astype(int)
        right, down, last = first + 1, first + self.columns + 1, first + self.columns + 2
        beyond = u + v > 1
        corner = np.stack([np.where(beyond, last, first), right, down])
        self._part = np.where(beyond, [u + v - 1, 1 - v, 1 - u], [1 - u - v, u, v])
        self._corners, which = np.unique(corner, return_inverse=True)
        self._corner = which.reshape(corner.shape)
        total = np.bincount(self._corner.ravel(), self._part.ravel(), len(self._corners))
        self._pull = self._part / np.maximum(total, 1e-30)[self._corner]

    def met(self, moved: Array, targets: Array) -> Array:
        """`moved` (V,), so shifted that the held points come to lie at `targets` (K,), complex.

        By what a point is missed, the corners around it are shifted, each by the mean of its
        points, and again, as each shift disturbs others. Where points contradict one another that
        has no end: no corner is shifted so far that cells of full size could fold.
        """
        targets, start = targets[self._held], moved[self._corners]
        place = start
        for _ in range(_ROUNDS):
            missed = targets - (self._part * place[self._corner]).sum(axis=0)
            if np.abs(missed).max(initial=0) < _MET:
                break
            step, corner = (self._pull * missed).ravel(), self._corner.ravel()
            place = place + np.bincount(corner, step.real) + 1j * np.bincount(corner, step.imag)
        shift = place - start
        far = np.abs(shift) / (_SHIFT * self.side)
        moved = moved.copy()
        moved[self._corners] = start + shift / np.maximum(far, 1)
        return moved

    def order(self, values: Array) -> None:
        """Where the sheet lies over itself, larger values (V,) shall be above."""
        which = np.argsort(values[self._triangles].mean(axis=1), kind="stable")
        self._triangles, self._cell = self._triangles[which], self._cell[which]
        self._source, self._area = self._source[:, which], self._area[which]

    def drawn(
        self, moved: Array, width: int, height: int, tear: float, cells: Array | None = None
    ) -> tuple[Array, Array]:
        """The pixels of a width x height picture that the sheet covers, and what lies there.

        moved: (V,) complex, where the vertices are. tear: a triangle that is stretched by more
        than this is torn and covers nothing, nor does one that shows its back. cells:
        (rows,columns) bool, draw these alone.

        Returns (M,), the indices of pixels of the flattened picture, and (2,M) float32, the points
        of frame 1 that are there. A pixel may come several times: the last one is on top.
        """
        first = self._triangles[:, 0]
        origin = moved[first]
        e, f = moved[self._triangles[:, 1]] - origin, moved[self._triangles[:, 2]] - origin
        area = (e.conj() * f).imag
        longest = np.maximum(np.maximum(np.abs(e), np.abs(f)), np.abs(e - f))
        seen = (area > _FLAT * self._area) & (longest < tear * 1.5 * self.side)
        if cells is not None:
            seen &= cells.ravel()[self._cell]
        down, up = np.maximum(e.imag, f.imag), np.minimum(e.imag, f.imag)
        top = np.ceil(origin.imag + np.minimum(up, 0) - _SLACK).clip(0, height)
        bottom = (np.floor(origin.imag + np.maximum(down, 0) + _SLACK) + 1).clip(0, height)
        seen &= top < bottom
        which = np.flatnonzero(seen)
        top, rows = top[which].astype(np.int32), (bottom - top)[which].astype(np.int32)
        e, f, area, origin = e[which], f[which], area[which], origin[which]

        # In a triangle all is linear: a pixel q is origin + u e + v f. These are u and v of the
        # pixel (0, top), and their steps to the right and down.
        begin = 1j * top - origin
        u = np.stack([(begin.conj() * f).imag, f.imag, -f.real]) / area
        v = np.stack([(begin.conj() * e).imag, e.imag, -e.real]) / -area
        corner, first, second = self._source[:, which]
        place = u * first + v * second
        place[0] += corner
        edges = np.stack([u, v, -u - v])
        edges[2, 0] += 1
        bounds, left = _bounds(edges)

        ends = np.cumsum(rows, dtype=np.int64)
        indices, points = [np.zeros(0, np.int64)], [np.zeros((2, 0), np.float32)]
        start = 0
        while start < len(which):
            done = int(ends[start - 1]) if start else 0
            end = max(int(np.searchsorted(ends, done + _AT_ONCE, side="right")), start + 1)
            part = slice(start, end)
            hit, where = _covered(
                rows[part], top[part], bounds[..., part], left[:, part], place[:, part], width
            )
            indices.append(hit)
            points.append(where)
            start = end
        return np.concatenate(indices), np.concatenate(points, axis=1)


def _bounds(edges: Array) -> tuple[Array, Array]:
    """Where the rows of triangles end at their edges.

    edges: (3,3,T), of each edge what is at least 0 inside: its value at the pixel (0, top), and
    its steps to the right and down. Returns (2,3,T), the column where an edge cuts the row at the
    top, and its step down; and (3,T) bool, whether the triangle is to the right of it.
    """
    value, right, down = edges.swapaxes(0, 1)
    left = right >= 0
    # An edge along the row bounds nothing, or leaves nothing.
    inverse = -1 / np.where(np.abs(right) < _LEVEL, np.where(left, _LEVEL, -_LEVEL), right)
    return np.stack([(value + _SLACK) * inverse, down * inverse]), left


def _covered(
    rows: Array, top: Array, bounds: Array, left: Array, place: Array, width: int
) -> tuple[Array, Array]:
    """The pixels in each triangle, row by row, and their points.

    place: (3,T) complex, the point at the pixel (0, top), and its steps to the right and down.
    """
    triangle, row = _counted(rows)
    low, high = np.zeros(len(row)), np.full(len(row), width - 1.0)
    for column, step, is_left in zip(*bounds, left, strict=True):
        bound = column[triangle] + step[triangle] * row
        where = is_left[triangle]
        np.maximum(low, bound, out=low, where=where)
        np.minimum(high, bound, out=high, where=~where)
    low = np.ceil(low)
    counts = np.maximum(np.floor(high) - low + 1, 0).astype(np.int32)
    corner, right, down = place
    span, column = _counted(counts)
    point = (corner[triangle] + right[triangle] * low + down[triangle] * row)[span]
    point += right[triangle[span]] * column
    pixel = ((top[triangle] + row) * width + low.astype(np.int64))[span] + column
    return pixel, np.stack([point.real, point.imag]).astype(np.float32)


def _counted(counts: Array) -> tuple[Array, Array]:
    """0 counts[0] times, 1 counts[1] times and so on, and the number of each among its own."""
    which = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts, dtype=np.int64) - counts
    return which, np.arange(len(which)) - before[which]
