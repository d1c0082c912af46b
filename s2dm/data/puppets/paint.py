"""Painting textures with signed distance functions.

A `Canvas` is the picture of one rigid piece in the piece's own coordinates. Shapes are given by a
signed distance (negative inside) at every point of the canvas; they are filled with soft edges and
shaded as if inflated, so that a flat outline looks like a little cushion. The shading is painted
into the texture and moves with the piece.
"""

from __future__ import annotations

import numpy as np

from .persons import Colour

Array = np.ndarray

#: Darkest shade of a lit surface, as a factor on its colour.
_AMBIENT = 0.58


class Canvas:
    """An RGBA texture over the rectangle `bounds` = (left, top, right, bottom), y downwards.

    Args:
        bounds: the rectangle in units of the figure (one unit is one pixel of a 128-pixel clip).
        density: texels per unit.
        light: (3,) direction to the light in this canvas: right, down, towards the viewer.
    """

    def __init__(
        self, bounds: tuple[float, float, float, float], density: float, light: Array
    ) -> None:
        left, top, right, bottom = bounds
        width = int(np.ceil((right - left) * density))
        height = int(np.ceil((bottom - top) * density))
        self.left, self.top, self.density = left, top, density
        self.x = (left + (np.arange(width, dtype=np.float32) + 0.5) / density)[None, :]
        self.y = (top + (np.arange(height, dtype=np.float32) + 0.5) / density)[:, None]
        self.rgb = np.zeros((height, width, 3), dtype=np.float32)
        self.alpha = np.zeros((height, width), dtype=np.float32)
        self._shadows = np.ones((height, width), dtype=np.float32)
        self._light = light / np.linalg.norm(light)

    def shade(self, distance: Array, radius: float) -> Array:
        """Brightness of a shape inflated over its outermost `radius` units, about 0.6 to 1.15."""
        flatness = np.clip(-distance / radius, 0.0, 1.0)
        slope_y, slope_x = np.gradient(distance, 1 / self.density)
        lean = (1 - flatness) * 0.95
        facing = np.sqrt(1 - lean**2)
        lit = lean * (slope_x * self._light[0] + slope_y * self._light[1]) + facing * self._light[2]
        return _AMBIENT + (1.12 - _AMBIENT) * np.clip(lit, 0, 1)

    def fill(
        self,
        distance: Array,
        colour: Colour | Array,
        round: float | None = None,
        inside: bool = False,
        strength: float = 1.0,
    ) -> None:
        """Fill a shape.

        Args:
            distance: (h, w) signed distance in units.
            colour: one colour, or (h, w, 3).
            round: shade the shape as if inflated over this many units; None keeps the shading that
                is already there (a print on the cloth).
            inside: paint only where the canvas is already covered.
            strength: opacity.
        """
        cover = np.clip(0.5 - distance * self.density, 0, 1) * strength
        colour = np.asarray(colour, dtype=np.float32)
        if round is not None:
            self._shadows += (self.shade(distance, round) - self._shadows) * cover
        paint = colour * self._shadows[..., None]
        if inside:
            cover = cover * self.alpha
        alpha = cover + self.alpha * (1 - cover)
        weight = (cover / np.maximum(alpha, 1e-6))[..., None]
        self.rgb += (np.broadcast_to(paint, self.rgb.shape) - self.rgb) * weight
        self.alpha = alpha

    def tint(self, factor: Array) -> None:
        """Multiply the colours by `factor` (h, w)."""
        self.rgb *= factor[..., None]


def ellipse(canvas: Canvas, x: float, y: float, a: float, b: float) -> Array:
    """Signed distance, nearly, to an axis-parallel ellipse."""
    return (np.hypot((canvas.x - x) / a, (canvas.y - y) / b) - 1) * min(a, b)


def box(canvas: Canvas, x: float, y: float, a: float, b: float, r: float = 0.0) -> Array:
    """Signed distance to a rectangle with half sides a, b and corners rounded by r."""
    return _rounded(np.abs(canvas.x - x) - a, np.abs(canvas.y - y) - b, r)


def trunk(canvas: Canvas, widths: Array, top: float, bottom: float, r: float) -> Array:
    """Signed distance, nearly, to a symmetric shape with half widths (h, 1) between two heights."""
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    return _rounded(np.abs(canvas.x) - widths, np.abs(canvas.y - middle) - half, r)


def capsule(canvas: Canvas, ax: float, ay: float, bx: float, by: float, ra: float, rb: float):
    """Signed distance, nearly, to a capsule from a to b that tapers from radius ra to rb."""
    dx, dy = bx - ax, by - ay
    along = ((canvas.x - ax) * dx + (canvas.y - ay) * dy) / (dx * dx + dy * dy + 1e-9)
    along = np.clip(along, 0, 1)
    return np.hypot(canvas.x - ax - along * dx, canvas.y - ay - along * dy) - (
        ra + (rb - ra) * along
    )


def _rounded(qx: Array, qy: Array, r: float) -> Array:
    qx, qy = qx + r, qy + r
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - r
