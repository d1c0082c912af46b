"""Calm procedural rooms. A room is painted once for a clip: nothing in it moves."""

from __future__ import annotations

import numpy as np

from .paint import Array, Canvas, box, ellipse
from .persons import Colour

_WALLS: tuple[Colour, ...] = (
    (0.78, 0.84, 0.88), (0.90, 0.84, 0.74), (0.80, 0.86, 0.76), (0.90, 0.78, 0.76),
    (0.76, 0.76, 0.86), (0.86, 0.86, 0.84), (0.72, 0.82, 0.82), (0.92, 0.88, 0.66),
)  # fmt: skip
_FLOORS: tuple[Colour, ...] = (
    (0.66, 0.50, 0.36), (0.58, 0.56, 0.55), (0.52, 0.40, 0.32), (0.70, 0.64, 0.54),
    (0.46, 0.52, 0.50),
)  # fmt: skip


def paint_room(
    rng: np.random.Generator,
    size: int,
    ground: tuple[float, float],
    bench: float | None,
    figure: float = 1.0,
    margin: int = 0,
) -> Array:
    """Paint a room.

    Args:
        rng: decides wall, floor, furniture and light.
        size: height and width in pixels.
        ground: where the figure stands, in pixels (x, y): a soft, static shadow lies there.
        bench: None, or the figure's pixels per unit: a bench stands behind it.
        figure: size of the figure, which its shadow shares; 1 is the usual one.
        margin: pixels that are painted beyond each edge.

    Returns:
        (size + 2 margin, size + 2 margin, 3) float32 in [0, 1].
    """
    # Painted in a frame of 128 units at twice the resolution, then averaged.
    unit = 128 / size
    # A quarter of a texel less, which the canvas rounds up: no rounding error adds one.
    low, high = -margin * unit, 128 + (margin - 1 / 8) * unit
    canvas = Canvas((low, low, high, high), 2 / unit, np.array([-0.3, -0.6, 0.75]))
    x, y = canvas.x, canvas.y
    wall = np.array(_WALLS[rng.integers(len(_WALLS))])
    floor = np.array(_FLOORS[rng.integers(len(_FLOORS))])
    horizon = rng.uniform(88, 97)
    whole = np.broadcast_to(np.float32(-1.0), canvas.alpha.shape)
    canvas.fill(whole, wall)
    style = rng.integers(4)
    if style == 0:  # wallpaper stripes
        pitch = rng.uniform(12, 20)
        stripes = np.broadcast_to(np.abs(x % pitch - pitch / 2) - pitch / 4, whole.shape)
        canvas.fill(stripes, wall * 0.955)
    elif style == 1:  # panelling
        canvas.fill(np.broadcast_to(62 - y, whole.shape), wall * 0.93)
        canvas.fill(np.broadcast_to(np.abs(y - 62) - 0.9, whole.shape), wall * 0.82)
    _furniture(canvas, rng, wall, horizon)
    canvas.fill(np.broadcast_to(horizon - 4 - y, whole.shape), np.minimum(wall * 1.08, 1))
    canvas.fill(np.broadcast_to(horizon - y, whole.shape), floor)
    if rng.random() < 0.5:  # boards, closer together with distance
        for k in range(1, 8):
            line = horizon + 0.9 * k**1.75
            canvas.fill(np.broadcast_to(np.abs(y - line) - 0.3, whole.shape), floor * 0.86)
    else:
        rug = np.array(_WALLS[rng.integers(len(_WALLS))]) * rng.uniform(0.6, 0.85)
        canvas.fill(ellipse(canvas, 64, 117, 54, 11), rug)
        canvas.fill(np.abs(ellipse(canvas, 64, 117, 49, 9)) - 0.5, rug * 1.15)
    side = rng.uniform(-1, 1)
    light = 1.0 + 0.10 * side * (x - 64) / 64 - 0.09 * ((y - 40) / 88) ** 2
    canvas.tint(np.broadcast_to(light, whole.shape))
    gx, gy = ground[0] * unit, ground[1] * unit
    if bench is not None:
        _bench(canvas, gx, gy, bench * unit)
    across, deep = 21 * figure, 4.2 * figure
    shadow = np.exp(-(((x - gx) / across) ** 2 + ((y - gy - 0.5) / deep) ** 2) * 1.2)
    canvas.tint(1 - 0.34 * shadow)
    whole_size = size + 2 * margin
    rgb = canvas.rgb.reshape(whole_size, 2, whole_size, 2, 3).mean((1, 3))
    return np.clip(rgb, 0, 1).astype(np.float32)


def _furniture(canvas: Canvas, rng: np.random.Generator, wall: Array, horizon: float) -> None:
    sides = [rng.uniform(14, 30), rng.uniform(98, 114)]
    rng.shuffle(sides)
    things = rng.choice(5, rng.choice(3, p=(0.15, 0.50, 0.35)), replace=False)
    for x, thing in zip(sides, things, strict=False):
        if thing == 0:  # a window
            y, a, b = rng.uniform(34, 44), rng.uniform(10, 14), rng.uniform(14, 18)
            canvas.fill(box(canvas, x, y, a + 2, b + 2, 1), (0.97, 0.97, 0.95))
            blend = np.clip((canvas.y - y + b) / (2 * b), 0, 1)[..., None]
            sky = np.array((0.55, 0.76, 0.95)) * (1 - blend) + np.array((0.88, 0.95, 0.98)) * blend
            canvas.fill(box(canvas, x, y, a, b), np.broadcast_to(sky, canvas.rgb.shape))
            canvas.fill(box(canvas, x, y, 0.8, b), (0.97, 0.97, 0.95))
            canvas.fill(box(canvas, x, y, a, 0.8), (0.97, 0.97, 0.95))
        elif thing == 1:  # a picture
            y, a, b = rng.uniform(30, 46), rng.uniform(8, 12), rng.uniform(8, 12)
            canvas.fill(box(canvas, x, y, a + 1.6, b + 1.6), (0.42, 0.30, 0.22))
            canvas.fill(box(canvas, x, y, a, b), (0.95, 0.94, 0.90))
            frame = box(canvas, x, y, a - 1.5, b - 1.5)
            for _ in range(3):
                blob = ellipse(
                    canvas, x + rng.uniform(-5, 5), y + rng.uniform(-5, 5),
                    rng.uniform(3, 6), rng.uniform(3, 6),
                )  # fmt: skip
                canvas.fill(np.maximum(blob, frame), rng.uniform(0.35, 0.85, 3))
        elif thing == 2:  # a door
            colour = np.array(_FLOORS[rng.integers(len(_FLOORS))])
            canvas.fill(box(canvas, x, horizon - 30, 13, 36), np.minimum(wall * 1.1, 1))
            canvas.fill(box(canvas, x, horizon - 28, 11, 34), colour)
            canvas.fill(box(canvas, x, horizon - 44, 7.5, 12, 1), colour * 0.88)
            canvas.fill(ellipse(canvas, x + 8, horizon - 26, 1.3, 1.3), (0.90, 0.80, 0.45))
        elif thing == 3:  # a plant
            canvas.fill(box(canvas, x, horizon - 3, 5, 6, 1.5), (0.76, 0.44, 0.30))
            for angle in np.linspace(-1.1, 1.1, 5) + rng.uniform(-0.1, 0.1):
                leaf = ellipse(
                    canvas, x + 11 * np.sin(angle), horizon - 12 - 11 * np.cos(angle), 4.4, 6.4
                )
                canvas.fill(leaf, (0.26, 0.52 + 0.06 * np.cos(5 * angle), 0.32))
        else:  # a shelf with books
            y = rng.uniform(36, 50)
            at = x - 11
            while at < x + 8:
                w, h = rng.uniform(2.2, 4.0), rng.uniform(7, 12)
                canvas.fill(
                    box(canvas, at + w / 2, y - h / 2, w / 2, h / 2), rng.uniform(0.3, 0.8, 3)
                )
                at += w + 0.4
            canvas.fill(box(canvas, x, y + 1, 13, 1.3), (0.50, 0.36, 0.26))


def _bench(canvas: Canvas, x: float, y: float, scale: float) -> None:
    wood, dark = (0.66, 0.46, 0.28), (0.45, 0.31, 0.20)
    top = y - 19.5 * scale
    middle, half = (top + y) / 2, (y - top) / 2
    for side in (-1, 1):
        canvas.fill(box(canvas, x + side * 16 * scale, middle, 1.8 * scale, half), dark)
    canvas.fill(box(canvas, x, top, 20 * scale, 2.6 * scale, 1.5), wood)
