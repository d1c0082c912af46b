"""`s2dm convert`: between a checkpoint file, a diffusers folder and pickled weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_sampling, sampling_entries


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert between a checkpoint file, a diffusers folder and pickled weights",
        description="Convert a diffusers folder to one .safetensors file or back, or pickled "
        "weights (.ckpt, .pt, .pth, .bin) to .safetensors. Stable Diffusion 1.x, as a folder or a "
        "file, gets a new flow adapter, ready for training. LFDM's diffusion model becomes a "
        "checkpoint with the flow generator alone, its RegionMM one with a region-motion model; "
        "with these, BERT and a stage 2 in one file, LFDM makes the flow. Pickles are read as "
        "plain weights: code in them is never run.",
    )
    parser.add_argument("input", type=Path, help="file or folder to read")
    parser.add_argument("output", type=Path, help=".safetensors file, or folder, to write")
    parser.add_argument(
        "--with",
        dest="beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="more to put into the output: S2DM checkpoints, LFDM's weights, a folder with BERT",
    )
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    sampling = parser.add_argument_group(
        "recommended sampling",
        "What the output recommends, where it is to be something else than the input's.",
    )
    add_sampling(sampling)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..convert import convert

    convert(options.input, options.output, options.half, sampling_entries(options), options.beside)
    print(options.output)
