"""The paper's tables with our figures in them and its own beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .paper import TABLE_1, TABLE_2

TITLES = {"mhad": "UTD-MHAD", "mug": "MUG"}

Row = Mapping[str, Any]

TWO_STAGES = "S2DM, two stages"
ROWS_1 = {"S2DM, given flow": "given-flow-plain", TWO_STAGES: "two-stage-plain"}
"""Rows of table 1 that are measured here, by the mode of the evaluation."""

ROWS_2 = {
    ("shared", "shared"): ("shared", "given-flow-plain"),
    ("shared", "independent"): ("shared", "given-flow-plain:independent"),
    ("independent", "independent"): ("independent", "given-flow-plain:independent"),
}
"""Rows of table 2, by the training whose evaluation has them and the mode."""


def paper_tables(data: str, results: Mapping[str, Mapping[str, Row]]) -> str:
    """Both tables as Markdown.

    Args:
        data: "mhad" or "mug".
        results: the table of each evaluation, by training: "shared" and "independent"; and "lfdm"
            where LFDM's weights made the flow, as they did in the paper.
    """
    shared = results["shared"]
    lines = [
        f"## Table 1: {TITLES[data]}",
        "",
        "| method | FVD, the paper | FVD, here (95 %) | KVD, here | by class | by subject "
        "| videos |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, figures in TABLE_1.items():
        table = results.get("lfdm", shared) if method == TWO_STAGES else shared
        row = table.get(ROWS_1.get(method, ""))
        lines.append(f"| {method} | {figures[data]:.2f} | {_measured(row)} |")
    if "lfdm" in results:
        row = shared.get(ROWS_1[TWO_STAGES])
        lines.append(f"| {TWO_STAGES}, stage 1 trained here | – | {_measured(row)} |")
    lines += [
        "",
        f"## Table 2: {TITLES[data]}, noise in training and in sampling",
        "",
        "| training | sampling | FVD, the paper | FVD, here (95 %) | KVD, here | by class "
        "| by subject | videos |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (training, sampling), figures in TABLE_2.items():
        run, mode = ROWS_2[training, sampling]
        row = results.get(run, {}).get(mode)
        lines.append(f"| {training} | {sampling} | {figures[data]:.2f} | {_measured(row)} |")
    return "\n".join(lines)


def _measured(row: Row | None) -> str:
    if row is None or "fvd" not in row:
        return " | ".join("–" * 5)
    low, high = row["fvd_95"]
    labelled = [
        "{mean:.1f} ± {std:.1f}".format(**row[name]) if name in row else "–"
        for name in ("fvd_by_class", "fvd_by_subject")
    ]
    cells = [f"{row['fvd']:.2f} ({low:.2f} to {high:.2f})", f"{row['kvd']:.2f}", *labelled]
    return " | ".join([*cells, str(row["videos"])])
