"""Does stage 1 generate the motion that the prompt names?

On puppets of the test split (persons x actions that training never saw), with the true first frame
as reference frame:

  recognition  an action classifier, trained on true flows, on true held-out and generated flows
  motion       mean motion of generated over true clips, with the motion left to the prompt
  dial         mean motion at five motion strengths
  seeds        how far the flows of ten seeds differ from one another, over the mean motion

    python benchmarks/flow_generation.py
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch
from action_classifier import EPOCHS, FIRST_TAKE, SIZE, TAKES, accuracy, trained_classifier
from common import RESULTS, RUNS, TAKE, show
from torch import Tensor
from tqdm import tqdm

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.data.puppets import render_clip, split
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.files import write_json
from s2dm.flow import FlowField, flow_to_image
from s2dm.flow.geometry import resample
from s2dm.models import decode_flow, mean_motion
from s2dm.pipelines import TextToVideoPipeline, embed_prompts, flow_scheduler, generate_flow
from s2dm.video import write_contact_sheet

BATCH = 8
STRENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0)
SEEDS = 10
TARGET_RECOGNITION, TARGET_MOTION, TARGET_SEEDS = 0.8, 0.2, 0.25


class Stage1:
    """The flow generator of a checkpoint, on reference frames and captions of puppets."""

    def __init__(self, options: argparse.Namespace, store: Path) -> None:
        self.pipeline = TextToVideoPipeline.from_single_file(options.checkpoint)
        self.network = self.pipeline.flow_generator.network
        self.options = options
        self.store = store

    @torch.no_grad()
    def generate(
        self, clips: list[Any], seed: int = 0, strength: float | None = None, title: str = ""
    ) -> Tensor:
        """Flow conditions (C,N,3,h,w) of generated clips, kept in the run's folder."""
        path = self.store / f"{len(clips)}-{seed}-{strength}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        config, pipeline = self.network.config, self.pipeline
        generator = torch.Generator().manual_seed(seed)
        made = []
        for start in tqdm(range(0, len(clips), BATCH), desc=title or "generating", leave=False):
            part = clips[start : start + BATCH]
            frames = torch.stack([clip.frames[0] for clip in part]) * 2 - 1
            latents = pipeline.vae.encode(frames).latent_dist.mode()
            motion = None
            if strength is not None:
                motion = torch.full((len(part),), strength * config.motion)
            samples = generate_flow(
                self.network,
                flow_scheduler(config.schedule),
                embed_prompts(
                    pipeline.text_encoder, pipeline.tokenizer, [clip.caption for clip in part]
                ),
                latents * pipeline.vae.config.scaling_factor,
                self.options.steps,
                self.options.guidance,
                generator,
                motion,
            )
            made += [decode_flow(s, config, *config.size).condition(*config.size) for s in samples]
        made = torch.stack(made)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(made, path)
        return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--clips", type=int, default=65)
    parser.add_argument("--dial-clips", type=int, default=16)
    parser.add_argument("--seed-clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "flow_generation.json")
    options = parser.parse_args()

    pairs = split(options.split)
    random.Random(0).shuffle(pairs)
    pairs = pairs[: options.clips]
    clips = [render_clip(person, action, TAKE, 128, 16) for person, action in tqdm(pairs, "clips")]
    actions = torch.tensor([action for _, action in pairs])
    weights = file_hash(options.checkpoint)
    card = ProtocolCard(
        checkpoint=f"{options.checkpoint.name} ({weights})",
        clips=len(pairs),
        data=f"puppets, person x action combinations of the {options.split} split in an order "
        f"seeded with 0, take {TAKE}; the true first frame is the reference frame",
        frames=16,
        size=(128, 128),
        seeds=list(range(SEEDS)),
        notes={
            "sampling": f"DPM-Solver++ 2M, {options.steps} steps, guidance {options.guidance:g}, "
            "float32; seed 0 but for the comparison of seeds",
            "classifier": f"27 actions from flow of {SIZE[0]}x{SIZE[1]}, trained for {EPOCHS} "
            f"epochs on {TAKES} takes from number {FIRST_TAKE} on of the training split",
            "motion": "mean length of the displacement over all pixels and frames",
            "dial": f"{options.dial_clips} of the clips, motion strength times the mean motion of "
            "the training clips",
            "seeds differ": f"mean over the pairs of {SEEDS} seeds of the mean length of the "
            f"difference of two flows, over the mean motion; {options.seed_clips} of the clips",
        },
    )
    show("Stage 1 on held-out puppets", card)
    key = json.dumps([weights, options.split, options.steps, options.guidance, card.code])
    store = RUNS / "flow_generation" / hashlib.sha256(key.encode()).hexdigest()[:12]
    stage1 = Stage1(options, store)

    size = stage1.network.config.size
    true = torch.stack([clip.flow.condition(*size) for clip in clips])
    made = stage1.generate(clips)
    classifier = trained_classifier()
    table = {
        "recognised_true": accuracy(classifier, _classified(true), actions),
        "recognised_generated": accuracy(classifier, _classified(made), actions),
        "motion_true": mean_motion(true).mean().item(),
        "motion_generated": mean_motion(made).mean().item(),
    }
    table["dial"] = {
        str(strength): mean_motion(
            stage1.generate(clips[: options.dial_clips], 0, strength, f"strength {strength:g}")
        )
        .mean()
        .item()
        for strength in STRENGTHS
    }
    some = clips[: options.seed_clips]
    by_seed = [stage1.generate(some, seed, None, f"seed {seed}")[:, :, :2] for seed in range(SEEDS)]
    apart = [(a - b).norm(dim=2).mean().item() for a, b in itertools.combinations(by_seed, 2)]
    motion = torch.stack(by_seed).norm(dim=3).mean().item()
    table["seeds_differ"] = sum(apart) / len(apart) / motion
    print(markdown(table))
    sheet = options.output.with_suffix(".jpg")
    _write_sheet(sheet, clips[:6], made[:6])
    write_json(options.output, {"protocol": card.to_dict(), "table": table, "sheet": sheet.name})
    print(f"\n{options.output}\n{sheet}")


def _classified(conditions: Tensor) -> Tensor:
    """Conditions at the size that the classifier reads."""
    return resample(conditions.flatten(0, 1), *SIZE).unflatten(0, conditions.shape[:2])


def checks(table: dict[str, Any]) -> list[tuple[str, bool]]:
    """What stage 1 must reach, in words, and whether it does."""
    recognition = table["recognised_generated"] / table["recognised_true"]
    motion = table["motion_generated"] / table["motion_true"]
    dial = list(table["dial"].values())
    rises = all(a < b for a, b in itertools.pairwise(dial))
    return [
        (
            f"Action recognised at least {TARGET_RECOGNITION:.0%} as often as in true flows: "
            f"{recognition:.0%}",
            recognition >= TARGET_RECOGNITION,
        ),
        (
            f"Mean motion within {TARGET_MOTION:.0%} of the true one: {motion - 1:+.0%}",
            abs(motion - 1) <= TARGET_MOTION,
        ),
        (
            "Motion rises with the dial: "
            + ", ".join(f"{m / table['motion_true']:.2f}" for m in dial)
            + " times the true mean",
            rises,
        ),
        (
            f"Seeds differ by at least {TARGET_SEEDS:g} of the mean motion: "
            f"{table['seeds_differ']:.2f}",
            table["seeds_differ"] >= TARGET_SEEDS,
        ),
    ]


def markdown(table: dict[str, Any]) -> str:
    """The table of the results page."""
    return "\n".join(
        [
            "| flow | action recognised | mean motion, half-frames |",
            "|---|---|---|",
            f"| true | {table['recognised_true']:.0%} | {table['motion_true']:.4f} |",
            f"| generated | {table['recognised_generated']:.0%} | "
            f"{table['motion_generated']:.4f} |",
            "",
            *(f"- {text}, {'met' if met else '**missed**'}." for text, met in checks(table)),
        ]
    )


def _write_sheet(path: Path, clips: list[Any], made: Tensor) -> None:
    rows, labels = [], []
    for clip, condition in zip(clips, made, strict=True):
        height, width = clip.frames.shape[-2:]
        scale = max(clip.flow.magnitude().max().item(), 1.0)
        rows += [
            clip.frames,
            flow_to_image(clip.flow, scale),
            flow_to_image(FlowField.from_condition(condition, height, width), scale),
        ]
        labels += [clip.caption, "true flow", "generated from prompt and first frame"]
    write_contact_sheet(path, rows, labels)


if __name__ == "__main__":
    main()
