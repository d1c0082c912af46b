"""How well flow is estimated, beside the exact flow of held-out puppets.

OpenCV's two methods and, with --region-motion, a trained region-motion model measure the motion of
every clip; "true keypoints" is what the puppets' skeletons alone say, "still" that nothing moves.

    python benchmarks/flow_estimators.py --region-motion FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS

from s2dm.data import Clip, DataConfig, held_out_clips
from s2dm.evaluation.clip_metrics import flow_error
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.files import write_json
from s2dm.flow import FlowField, estimate_flow, pose_flow
from s2dm.flow.estimate import METHODS
from s2dm.models import load_checkpoint
from s2dm.pipelines.modules import build

Find = Callable[[Clip], FlowField]

KINDS = {"usual place, still camera": {}, "elsewhere, moving cameras": {"elsewhere": 1.0}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--region-motion", type=Path, help="a checkpoint with such a model")
    parser.add_argument("--clips", type=int, default=12, help="of each kind")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "flow_estimators.json")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    methods: dict[str, Find] = {name: partial(_estimated, name) for name in METHODS}
    file = options.region_motion
    if file is not None:
        checkpoint = load_checkpoint(file, ("region_motion",))
        methods["region motion"] = partial(_estimated, build(checkpoint, "region_motion").eval())
    methods["true keypoints"] = lambda clip: pose_flow(clip.pose, clip.flow.height, clip.flow.width)
    methods["still"] = lambda clip: clip.flow.scale(0)
    table: dict[str, dict[str, Any]] = {}
    for kind, settings in KINDS.items():
        data = DataConfig(
            name="puppets",
            size=options.size,
            frames=16,
            takes=1,
            options={"first_take": 1000, **settings},
        )
        clips = held_out_clips(data, options.clips)
        table[kind] = {name: measure(clips, find) for name, find in methods.items()}
    card = ProtocolCard(
        checkpoint="none" if file is None else f"{file.name} ({file_hash(file)})",
        data=f"{options.clips} held-out puppets of each kind, first_take 1000",
        frames=16,
        size=(options.size, options.size),
        notes={
            "flow error": "end-point error where the true flow is longer than 1 pixel and not "
            "occluded, over the mean length there",
            "hidden found": "mean occlusion where frame 1 hides the pixel",
            "seen hidden": "mean occlusion where frame 1 shows it",
        },
    )
    print(markdown(table))
    write_json(options.output, {"protocol": card.to_dict(), "table": table})
    print(f"\n{options.output}")


def _estimated(method: Any, clip: Clip) -> FlowField:
    return estimate_flow(clip.pixels, method)


def measure(clips: list[Clip], find: Find) -> dict[str, float]:
    """Figures of one way to find the flow of clips, over all of them."""
    errors, hidden, shown = [], [], []
    for clip in clips:
        true, found = clip.flow, find(clip)
        errors.append(flow_error(found, true))
        covered = true.occlusion > 0.5
        hidden.append(found.occlusion[covered])
        shown.append(found.occlusion[~covered])
    return {
        "flow_error": sum(e.total for e in errors) / sum(e.weight for e in errors),
        "hidden_found": float(torch.cat(hidden).mean()),
        "seen_hidden": float(torch.cat(shown).mean()),
    }


def markdown(table: dict[str, dict[str, Any]]) -> str:
    lines = ["| clips | estimator | flow error / motion | hidden found | seen hidden |"]
    lines.append("|---|---|---|---|---|")
    for kind, rows in table.items():
        for name, row in rows.items():
            figures = " | ".join(f"{row[key]:.2f}" for key in row)
            lines.append(f"| {kind} | {name} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
