"""The curves that a training run draws as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import replacing


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
