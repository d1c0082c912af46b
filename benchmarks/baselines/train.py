"""Train a baseline of text to video, or go on with a training run.

VDM denoises the latents of whole clips from the prompt, LVDM does so without one. Data and settings
in common are those of stage 2, see puppets.toml; the third baseline, warping, has nothing to train.

    python benchmarks/baselines/train.py vdm
    python benchmarks/baselines/train.py lvdm
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

# At the end: the pack's `nodes` must not hide a module of ComfyUI.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from video_diffusion_training import VideoDiffusionTrainingConfig, train

from s2dm.cli import leave_processes
from s2dm.settings import add_arguments, from_arguments

CONFIG = Path(__file__).with_name("puppets.toml")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks = parser.add_subparsers(dest="network", required=True, metavar="NETWORK")
    for name, text in (("vdm", "reads the prompt"), ("lvdm", "knows no prompt")):
        network = networks.add_parser(name, help=text)
        add_arguments(network)
        network.set_defaults(config=str(CONFIG))
    options = parser.parse_args(arguments)
    # First, so that what the user sets wins.
    options.overrides.insert(0, f"output=runs/{options.network}")
    options.overrides.append(f"text={json.dumps(options.network == 'vdm')}")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        train(from_arguments(VideoDiffusionTrainingConfig, options))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py {options.network}: {error}")
    finally:
        leave_processes()


if __name__ == "__main__":
    main()
