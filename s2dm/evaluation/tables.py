"""Figures of many clips: pooled, with intervals, as a table and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import replacing
from .clip_metrics import Total, pooled_figure
from .distances import bootstrap_interval, frechet_distance, kvd

Row = dict[str, Any]

# Title and digits of what the table shows.
_COLUMNS = {
    "flow_error": ("flow error / motion", 2),
    "motion": ("motion, pixels", 1),
    "flicker": ("flicker, of 255", 1),
    "warp_error": ("warp error, of 255", 1),
    "attributes": ("attributes", 2),
    "fvd": ("FVD", 1),
    "kvd": ("KVD", 2),
}


def summarise(
    totals: Sequence[Mapping[str, Total]],
    real: Tensor | None = None,
    generated: Tensor | Sequence[Tensor] | None = None,
    groups: Sequence[int] | None = None,
) -> Row:
    """One row: each metric over all clips, and its 95 % interval over clips as `NAME_95`.

    FVD and KVD of several seeds are the mean over the seeds, so that they compare equally many
    clips for any number of seeds; what each seed gave stands in `fvd_seeds` and `kvd_seeds`. Of
    clips with differing numbers of videos, all videos are compared at once.

    Args:
        totals: the metrics of each clip, over its seeds; empty of one that nothing was made of. A
            metric that could be measured on none is left out.
        real: features (N,D); without them, FVD and KVD are left out.
        generated: features (N,D), or (N,seeds,D), of the clips in the same order; or of each clip
            (videos,D), to be compared at once.
        groups: of each clip, where some are alike: see `bootstrap`.
    """
    add = partial(_add, groups=groups)
    made = [place for place, clip in enumerate(totals) if clip]
    made_groups = None if groups is None else [groups[place] for place in made]
    row: Row = {"clips": len(made)}
    for name in totals[made[0]]:
        values = [totals[place][name] for place in made]
        if not math.isnan(pooled_figure(values)):
            _add(row, name, pooled_figure, values, samples=1000, groups=made_groups)
    if real is not None and generated is not None and not isinstance(generated, Tensor):
        row["videos"] = sum(len(videos) for videos in generated)
        for name, distance in (("fvd", frechet_distance), ("kvd", kvd)):
            add(row, name, partial(of_all_videos, distance), real, generated, samples=100)
    elif real is not None and generated is not None:
        generated = generated if generated.ndim == 3 else generated[:, None]
        for name, distance in (("fvd", frechet_distance), ("kvd", kvd)):
            add(row, name, partial(mean_over_seeds, distance), real, generated, samples=100)
            if generated.shape[1] > 1:
                row[f"{name}_seeds"] = [distance(real, seed) for seed in generated.unbind(1)]
    return row


def mean_over_seeds(
    distance: Callable[[Tensor, Tensor], float], real: Tensor, generated: Tensor
) -> float:
    """Mean over the seeds of the distance between features (N,D) and (M,seeds,D)."""
    return statistics.fmean(distance(real, seed) for seed in generated.unbind(1))


def of_all_videos(
    distance: Callable[[Tensor, Tensor], float], real: Tensor, generated: Sequence[Tensor]
) -> float:
    """The distance between features (N,D) and those of all videos, (videos,D) of each clip."""
    return distance(real, torch.cat([*generated]))


def by_label(
    real: Tensor, generated: Sequence[Tensor], labels: Sequence[str]
) -> dict[str, Any] | None:
    """FVD of the clips of each label by itself, as LFDM reports by class and by subject.

    Args:
        real: features (N,D).
        generated: of each clip (videos,D).
        labels: of each clip.

    Returns:
        `mean` and `std` (of N − 1) over the labels that have two clips and two videos, and the
        `values` by label; None where fewer than two labels have.
    """
    values = {}
    for label in sorted(set(labels)):
        members = [place for place, other in enumerate(labels) if other == label]
        videos = torch.cat([generated[place] for place in members])
        if len(members) > 1 and len(videos) > 1:
            values[label] = frechet_distance(real[members], videos)
    if len(values) < 2:
        return None
    found = [*values.values()]
    return {"mean": statistics.fmean(found), "std": statistics.stdev(found), "values": values}


def label_table(table: Mapping[str, Row], titles: Mapping[str, str]) -> str:
    """What `by_label` found for the rows that have it; empty where none has."""
    names = {"fvd_by_class": "FVD by class", "fvd_by_subject": "FVD by subject"}
    rows = {key: row for key, row in table.items() if any(name in row for name in names)}
    if not rows:
        return ""
    lines = [f"| mean ± deviation | {' | '.join(names.values())} |", "|---|---|---|"]
    for key, row in rows.items():
        cells = [
            "{mean:.1f} ± {std:.1f} ({count})".format(**row[name], count=len(row[name]["values"]))
            if name in row
            else "–"
            for name in names
        ]
        lines.append(f"| {' | '.join([titles[key], *cells])} |")
    return "\n".join(lines)


def _add(
    row: Row, name: str, statistic: Any, *sets: Any, samples: int, groups: Sequence[int] | None
) -> None:
    row[name] = statistic(*sets)
    edges = bootstrap_interval(statistic, *sets, samples=samples, paired=True, groups=groups)
    row[f"{name}_95"] = list(edges)


def markdown_table(table: Mapping[str, Row], titles: Mapping[str, str]) -> str:
    """The rows that `summarise` made, by name, with a title each; intervals in brackets."""
    names = [name for name in _COLUMNS if any(name in row for row in table.values())]
    lines = [
        "| clips | N | " + " | ".join(f"{_COLUMNS[name][0]} (95 %)" for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for key, row in table.items():
        cells = [titles[key], str(row["clips"]), *(_cell(row, name) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if name not in row:
        return "–"
    digits = _COLUMNS[name][1]
    low, high = row[f"{name}_95"]
    given = f" of {row['given_motion']:.{digits}f}" if name == "motion" else ""
    return f"{row[name]:.{digits}f}{given} ({low:.{digits}f} to {high:.{digits}f})"


def save_plots(path: Path, table: Mapping[str, Row], titles: Mapping[str, str]) -> None:
    """One panel for each metric: the rows side by side, with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in _COLUMNS if any(name in row for row in table.values())]
    figure = Figure(figsize=(2.2 + 2.2 * len(names), 1.2 + 0.45 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), number + 1)
        for place, row in enumerate(table.values()):
            if name in row:
                low, high = row[f"{name}_95"]
                axes.plot([low, high], [place, place], color="0.6", linewidth=3)
                axes.plot(row[name], place, "o", color=f"C{place}")
        axes.set_title(_COLUMNS[name][0], fontsize=9)
        axes.set_yticks(range(len(table)), [titles[key] for key in table] if number == 0 else [])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
