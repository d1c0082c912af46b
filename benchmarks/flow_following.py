"""Does a generated clip move as the given flow says, and does the rest stand still?

On puppets of the test split (persons x actions that training never saw): the exact flow of a clip
and its caption go into the model, as the checkpoint recommends (anchored) and by the paper's plain
method, this with shared and with independent noise, and the flow of the generated clip is compared
with the flow that was given. Beside it, in the same units: zero flow,
what a clip scores that ignores the motion; and the true clip, as it is and through the autoencoder,
the errors of the estimator itself and of anything that is decoded.

This is `s2dm evaluate` on a fixed choice of clips. A stopped run goes on where it was, and several
processes share the clips (`torchrun --nproc-per-node 2 benchmarks/flow_following.py`).

    python benchmarks/flow_following.py
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from common import RESULTS, RUNS, TAKE

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.cli.options import add_sampling, sampling_entries
from s2dm.data import DataConfig
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.run import EvaluationConfig, evaluate
from s2dm.evaluation.tables import markdown_table
from s2dm.files import write_json

VARIANTS = tuple(
    map(
        Variant.parse,
        (
            "given-flow",
            "given-flow-plain",
            "given-flow-plain:independent",
            "zero-flow",
            "true",
            "autoencoder",
        ),
    )
)
TITLES = {str(variant): variant.title for variant in VARIANTS}
TARGET_ERROR, TARGET_FLICKER, TARGET_WARP_ERROR = 0.33, 0.8, 2.8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--clips", type=int, default=24)
    add_sampling(parser)
    parser.add_argument("--i3d", type=Path, help="weights of I3D, for FVD and KVD")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "flow_following.json")
    options = parser.parse_args()

    run = RUNS / "flow_following"
    result = evaluate(
        EvaluationConfig(
            checkpoint=options.checkpoint,
            output=run,
            data=DataConfig(options={"first_take": TAKE}),
            clips=options.clips,
            variants=VARIANTS,
            sampling=sampling_entries(options),
            i3d=options.i3d,
            cpu=options.cpu,
        )
    )
    if result is None:  # not the main process
        return
    print(markdown_table(result["table"], TITLES))
    sheet = options.output.with_suffix(".jpg")
    write_json(options.output, {**result, "sheet": sheet.name})
    shutil.copyfile(run / "sheet.jpg", sheet)
    print(f"\n{options.output}\n{sheet}")


if __name__ == "__main__":
    main()
