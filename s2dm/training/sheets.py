"""Pictures that a training run writes as it goes: contact sheets and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def save_sheet(path: str | Path, rows: Sequence[Tensor], gap: int = 2) -> None:
    """Write rows of pictures, each row (N,3,H,W) in [0,1], as one PNG.

    Rows may differ in length; all pictures have one size.
    """
    from PIL import Image

    height, width = rows[0].shape[-2:]
    columns = max(len(row) for row in rows)
    sheet = torch.ones(3, len(rows) * (height + gap) - gap, columns * (width + gap) - gap)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row.float().cpu().clamp(0, 1)):
            top, left = y * (height + gap), x * (width + gap)
            sheet[:, top : top + height, left : left + width] = picture
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    target = Path(path)
    temporary = target.with_name("." + target.name)
    Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
    temporary.replace(target)


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
    target = Path(path)
    temporary = target.with_name("." + target.name)
    figure.savefig(temporary, format="png", dpi=90)
    temporary.replace(target)
