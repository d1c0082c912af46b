"""What sharing noise changes in training: the loss, and how its gradient scatters over batches.

Each of the ablation's checkpoints (docs/training.md, "Ablation") is given the same batches of its
training, once with shared and once with independent noise. Nothing is trained. Where the loss is
the same and the gradient scatters more, a training learns more slowly from as many steps.

    python benchmarks/noise_in_training.py --shared runs/ablation_shared/export.safetensors \
        --independent runs/ablation_independent/export.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, RUNS

from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.files import write_json
from s2dm.settings import read_settings
from s2dm.training.cpu import plain_attention, speed_up
from s2dm.training.loop import step_generator
from s2dm.training.stage2 import Stage2TrainingConfig, build_stage2_task

CONFIG = ROOT / "s2dm" / "training" / "configs" / "puppets_ablation.toml"
SHARINGS = ("shared", "independent")
SEED = 77  # not that of the trainings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for sharing in SHARINGS:
        parser.add_argument(f"--{sharing}", type=Path, required=True, help=f"{sharing} noise")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--cache", type=Path, default=RUNS / "cache", help="prepared clips")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "noise_in_training.json")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    files = {sharing: getattr(options, sharing) for sharing in SHARINGS}
    table, task = {}, None
    for trained, file in files.items():
        task = _task(file, options.cache)
        for sharing in SHARINGS:
            task.config = dataclasses.replace(task.config, noise_sharing=sharing)
            table[f"{trained}, {sharing}"] = measure(task, options.batches)
    config = task.config
    card = ProtocolCard(
        checkpoint="; ".join(
            f"{name}: {file.name} ({file_hash(file)})" for name, file in files.items()
        ),
        data=f"{options.batches} batches of {config.clips} clips with {config.clip_frames} frames, "
        f"{config.data.name}, {config.data.split} split",
        frames=config.data.frames,
        size=(config.data.size, config.data.size),
        seeds=(SEED,),
        notes={
            "gradient variance": "mean squared distance of a batch's gradient from the mean one, "
            "over all weights that learn",
            "precision": "bfloat16 autocast",
        },
    )
    result = {"protocol": card.to_dict(), "table": table}
    print(markdown(table))
    write_json(options.output, result)
    print(f"\n{options.output}")


def _task(checkpoint: Path, cache: Path) -> Any:
    """Stage 2 with the weights of a checkpoint, and the batches of the ablation."""
    changes = [f"checkpoint={checkpoint}", f"cache={cache}", "vae=", "text_encoder="]
    config = read_settings(Stage2TrainingConfig, CONFIG, changes)
    task = build_stage2_task(config, torch.device("cpu"))
    speed_up(task.model)
    task.model.train()
    return task


def measure(task: Any, batches: int) -> dict[str, Any]:
    """Loss with its standard error, and the gradient's variance, over batches of a task."""
    cpu = torch.device("cpu")
    weights = [weight for weight in task.model.parameters() if weight.requires_grad]
    losses, squares, total = [], 0.0, None
    for number in range(batches):
        batch = task.batch(step_generator(SEED, number), cpu)
        with torch.autocast("cpu", torch.bfloat16), plain_attention(cpu):
            loss = task.model(batch)["loss"]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        gradient = torch.cat([part.flatten() for part in gradients if part is not None])
        losses.append(loss.item())
        squares += gradient.square().sum().item()
        total = gradient if total is None else total + gradient
    spread = squares - total.square().sum().item() / batches
    losses = torch.tensor(losses)
    return {
        "loss": losses.mean().item(),
        "loss_standard_error": losses.std().item() / math.sqrt(batches),
        "gradient_variance": spread / (batches - 1),
    }


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table of the results page."""
    lines = [
        "| trained with | noise in these batches | loss (standard error) | gradient variance |",
        "|---|---|---|---|",
    ]
    for name, row in table.items():
        trained, sharing = name.split(", ")
        lines.append(
            f"| {trained} | {sharing} | {row['loss']:.4f} ({row['loss_standard_error']:.4f}) | "
            f"{row['gradient_variance']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
