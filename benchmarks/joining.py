"""Which way of joining flow works on an image model that stays as it is?

First an image model of the puppets that knows no flow: the bundled U-Net without its flow adapter,
trained on for a while on single frames with their captions. It is then frozen, and for each fusion
an adapter alone is trained on it: the same clips, frames, noise and steps, from the same seed. All
of them follow the given flow of the same held-out clips, anchored to frame 1 and by the paper's
plain method. Beside them: zero flow, what a clip scores that ignores the motion, and the true clip
through the autoencoder.

Everything goes on where it was stopped. The intervals are over clips, of one training each.

    python benchmarks/joining.py
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, RUNS, TAKE
from torch.utils.data import Subset

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.data import DataConfig, build_dataset, register_dataset
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.protocol import file_hash
from s2dm.evaluation.run import EvaluationConfig, evaluate
from s2dm.evaluation.tables import markdown_table
from s2dm.files import write_json
from s2dm.models import (
    FUSIONS,
    Checkpoint,
    FlowAdapter,
    FlowAdapterConfig,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from s2dm.training.cache import ClipCache, build_clip_cache
from s2dm.training.loop import run_training
from s2dm.training.run_folder import training_of
from s2dm.training.stage2 import Stage2TrainingConfig, build_stage2_task

PLAIN, ANCHORED = Variant("given-flow-plain"), Variant("given-flow")
BESIDE = (Variant("zero-flow"), Variant("autoencoder"))
BASE_STEPS, STEPS = 500, 1500
LEARNING_RATES = {"channel": 1e-3, "token": 1e-3, "spatial": 3e-4, "channel+spatial": 3e-4}
"""Chosen by the loss of 30 steps on training clips, of 3e-4 and 1e-3 (spatial also 3e-3): the
better one for channel and for spatial; the other two have that of the one they are most like."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fusions", nargs="*", choices=FUSIONS, default=list(FUSIONS), help="none: the base alone"
    )
    parser.add_argument("--train-only", action="store_true", help="leave out the evaluation")
    add_shared_options(parser)
    parser.add_argument("--output", type=Path, default=RESULTS / "joining.json")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    register_dataset("puppets-part", _part)
    base = train_base(options)
    exports = {fusion: train_adapter(options, base, fusion) for fusion in options.fusions}
    if options.train_only or not exports:
        return
    result = measure(options, base, exports)
    print(markdown(result))
    write_json(options.output, result)
    print(f"\n{options.output}")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Options of every comparison of adapters on the frozen image model."""
    parser.add_argument("--steps", type=int, default=STEPS, help="of each adapter's training")
    parser.add_argument("--learning-rate", type=float, help="in place of each fusion's own")
    parser.add_argument("--training-clips", type=int, default=600)
    parser.add_argument("--clips", type=int, default=24, help="held-out clips of the evaluation")
    parser.add_argument("--frames", type=int, default=16, help="of a clip of the evaluation")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=RUNS / "joining", help="where runs are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw the clips")
    parser.add_argument("--cpu", action="store_true", help="evaluate without an accelerator")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--i3d", type=Path, help="weights of I3D, for FVD")


# --------------------------------------------------------------------------------- training


def _part(config: DataConfig, split: str) -> Any:
    """So many clips of a split of the puppets, spread over it."""
    count = config.options["clips"]
    whole = build_dataset(dataclasses.replace(config, name="puppets", options={}), split)
    return Subset(whole, torch.linspace(0, len(whole) - 1, count).long().tolist())


def settings(options: argparse.Namespace, name: str, **changes: Any) -> Stage2TrainingConfig:
    """What all trainings here share. Their sheets show clips of the training."""
    shared = {
        "output": str(options.runs / name),
        "data": DataConfig(
            "puppets-part",
            validation_split="train",
            frames=6,
            options={"clips": options.training_clips},
        ),
        "final_learning_rate": 1e-5,
        "warmup_steps": 10,
        "ema_decay": 0.99,
        "mixed_precision": "no",
        "threads": options.threads,
        "workers": 0,
        "log_every": 10,
        "sample_every_minutes": 1e6,
        "validation_clips": 1,
        "sample_frames": 4,
        "sample_steps": 8,
    }
    return Stage2TrainingConfig(**{**shared, **changes})


def train_base(options: argparse.Namespace) -> Path:
    """A checkpoint without flow adapter, whose U-Net was trained on captions alone."""
    path = options.runs / "base.safetensors"
    if path.exists():
        return path
    start = options.runs / "start.safetensors"
    _without_adapter(DEFAULT_CHECKPOINT, start)
    # The new adapter is without effect and stays so: the U-Net sees single frames and captions.
    config = settings(
        options,
        "base",
        checkpoint=str(start),
        train=("unet",),
        steps=BASE_STEPS,
        learning_rate=1e-4,
        clips=16,
        clip_frames=1,
        label_dropout=0.0,
        text_dropout=0.1,
        flow_dropout=0.0,
    )
    _train(options, config)
    _without_adapter(Path(config.output) / "export.safetensors", path)
    return path


def train_adapter(options: argparse.Namespace, base: Path, fusion: str) -> Path:
    """The base with an adapter that was trained on it."""
    rate = options.learning_rate or LEARNING_RATES[fusion]
    name = f"{fusion}-{rate:g}-{options.steps}"
    config = settings(
        options,
        name,
        checkpoint=str(base),
        fusion=fusion,
        train=("flow_adapter",),
        steps=options.steps,
        learning_rate=rate,
        clips=16,
        clip_frames=2,
        first_frame=0.2,
    )
    export = Path(config.output) / "export.safetensors"
    if not export.exists():
        _train(options, config)
    return export


def _train(options: argparse.Namespace, config: Stage2TrainingConfig) -> None:
    # One cache for all, with the conditions of spatial features: a grid's are made of them.
    side = config.data.size
    clips: ClipCache = build_clip_cache(
        options.runs / "cache", config.data, workers=options.workers, condition_size=(side, side)
    )
    run_training(config, partial(_task, config, clips))


def _task(config: Stage2TrainingConfig, clips: ClipCache, device: torch.device) -> Any:
    return build_stage2_task(config, device, clips)


def _without_adapter(source: Path, target: Path) -> None:
    found = load_checkpoint(source, ("unet", "text_encoder", "vae"))
    save_checkpoint(target, Checkpoint(found.config, found.states))


# ------------------------------------------------------------------------------- evaluation


def measure(options: argparse.Namespace, base: Path, exports: dict[str, Path]) -> dict[str, Any]:
    """Figures of all fusions on the same held-out clips."""
    table, protocol, trainings = {}, {}, {}
    for fusion, export in exports.items():
        beside = BESIDE if fusion == FUSIONS[0] else ()
        found = evaluate(evaluation(options, export, (PLAIN, ANCHORED, *beside)))
        for variant, row in found["table"].items():
            known = Variant.parse(variant) in BESIDE
            kind = "anchored" if variant == str(ANCHORED) else "plain"
            table[variant if known else f"{fusion}, {kind}"] = row
        protocol = found["protocol"]
        run, steps = training_of(export)
        trainings[fusion] = {
            "parameters": parameters(read_config(export).flow_adapter),
            "steps": steps,
            "learning_rate": run["learning_rate"],
            "clips": run["clips"],
            "clip_frames": run["clip_frames"],
            "seed": run["seed"],
        }
    protocol["checkpoint"] = f"image model {file_hash(base)}, " + ", ".join(
        f"{fusion} {file_hash(export)}" for fusion, export in exports.items()
    )
    notes = {
        "image model": f"the bundled U-Net without its adapter, {BASE_STEPS} steps of 16 single "
        "frames with captions alone; frozen after that",
        "trained on": f"{options.training_clips} clips of the training split, 6 frames each, with "
        f"their exact flow; {run['clips']} of them in a step, {run['clip_frames']} frames of each",
    }
    return {"protocol": {**protocol, **notes}, "trainings": trainings, "table": table}


def evaluation(
    options: argparse.Namespace, export: Path, variants: tuple[Variant, ...]
) -> EvaluationConfig:
    """What is measured of a model: all on the same clips, kept in one folder."""
    return EvaluationConfig(
        checkpoint=export,
        output=options.runs / "evaluation",
        data=DataConfig(frames=options.frames, options={"first_take": TAKE}),
        clips=options.clips,
        variants=variants,
        sampling={"steps": options.sampling_steps},
        i3d=options.i3d,
        chunk_size=options.frames,
        cpu=options.cpu,
    )


def parameters(config: FlowAdapterConfig) -> int:
    """Weights of an adapter."""
    return sum(weight.numel() for weight in FlowAdapter(config, device="meta").parameters())


def markdown(result: dict[str, Any]) -> str:
    """Tables of the results page."""
    titles = {str(variant): variant.title for variant in BESIDE}
    table = result["table"]
    lines = [markdown_table(table, {name: titles.get(name, name) for name in table}), ""]
    lines += ["| fusion | parameters | learning rate | steps |", "|---|---|---|---|"]
    lines += [
        f"| {fusion} | {run['parameters'] / 1e6:.2f} million | {run['learning_rate']:g} | "
        f"{run['steps']} |"
        for fusion, run in result["trainings"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
