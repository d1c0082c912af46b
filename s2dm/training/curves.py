"""The curves that a training run draws as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..files import replacing
from ..video.frames import from_uint8, to_uint8


def save_curves(path: str | Path, records: Sequence[dict[str, float]]) -> None:
    """Plot every logged figure but the bookkeeping against the step, one panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bookkeeping = {"step", "minutes"}
    names = list(dict.fromkeys(k for r in records for k in r if k not in bookkeeping))
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, 1):
        points = [(r["step"], r[name]) for r in records if name in r]
        axes = figure.add_subplot(lines, columns, number)
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("step")
        if name.startswith("loss") and min(value for _, value in points) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def loss_picture(losses: Sequence[float], width: int = 512, height: int = 192) -> Tensor:
    """The losses of a run against its steps, (3, height, width) in [0, 1], drawn with Pillow.

    Single steps are pale, because a step's loss says most about its noise; the line is their
    running mean.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    if losses:
        smooth, mean = [], losses[0]
        for number, loss in enumerate(losses):
            mean += (loss - mean) * max(0.02, 1 / (number + 1))
            smooth.append(mean)
        low, high = min(losses), max(losses)
        left, top, right, bottom = 8, 20, width - 8, height - 20
        span, last = max(high - low, 1e-12), max(1, len(losses) - 1)

        def points(values: Sequence[float]) -> list[tuple[float, float]]:
            return [
                (left + (right - left) * n / last, bottom - (bottom - top) * (v - low) / span)
                for n, v in enumerate(values)
            ]

        draw.line([*points(losses), points(losses)[-1]], fill=(190, 205, 230), width=1)
        draw.line([*points(smooth), points(smooth)[-1]], fill=(30, 80, 180), width=2)
        told = f"loss {smooth[-1]:.4f} (steps {low:.4f} to {high:.4f})"
        draw.text((left, 4), told, fill="black")
        draw.text((left, height - 16), f"step {len(losses)}", fill="black")
    return from_uint8(np.asarray(image).copy())


def write_loss_picture(path: str | Path, losses: Sequence[float]) -> None:
    """Write what `loss_picture` draws, whole or not at all."""
    from PIL import Image

    with replacing(Path(path)) as temporary:
        Image.fromarray(to_uint8(loss_picture(losses))).save(temporary, format="PNG")
