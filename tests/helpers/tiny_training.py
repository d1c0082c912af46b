"""A tiny data set, and runs of the trainers that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from s2dm.data import Clip, DataConfig, register_dataset
from s2dm.flow import FlowField
from s2dm.settings import from_dict
from s2dm.training.stage2 import Stage2TrainingConfig
from s2dm.training.vae import VAETrainingConfig

SIZE, FRAMES = 32, 4
DATA = {"name": "squares", "size": SIZE, "frames": FRAMES}
_RUN = {
    "preset": "tiny",
    "data": DATA,
    "steps": 4,
    "mixed_precision": "no",
    "workers": 0,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "log_every": 2,
}


class Squares:
    """Six clips of a square that moves one pixel a frame; counts how often it is asked."""

    asked = 0
    fail_after: int | None = None

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config = config
        self.seed = {"train": 0, "test": 100}[split]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Clip:
        if Squares.fail_after is not None and Squares.asked >= Squares.fail_after:
            raise RuntimeError("the disk is full")
        Squares.asked += 1
        generator = torch.Generator().manual_seed(self.seed + index)
        size, count = self.config.size, self.config.frames
        colour = torch.rand(3, 1, 1, generator=generator)
        frames = torch.full((count, 3, size, size), 0.5)
        displacement = torch.zeros(count, 2, size, size)
        for number in range(count):
            frames[number, :, 8:20, 4 + number : 16 + number] = colour
            displacement[number, 0, 8:20, 4 + number : 16 + number] = -number
        flow = FlowField(displacement, torch.zeros(count, 1, size, size))
        return Clip((frames * 255).round().to(torch.uint8), flow, f"square number {index}")


register_dataset("squares", Squares)


def data_config(**settings: Any) -> DataConfig:
    """The squares, in so many settings."""
    return from_dict(DataConfig, {**DATA, **settings})


def vae_config(folder: Path, **settings: Any) -> VAETrainingConfig:
    """A run of the VAE trainer; it needs the fixture `tiny_preset`."""
    values = {"output": str(folder), "batch_size": 2, "crop": 16, "validation_clips": 2}
    return from_dict(VAETrainingConfig, {**_RUN, **values, **settings})


def stage2_config(folder: Path, vae: Path | str, **settings: Any) -> Stage2TrainingConfig:
    """A run of the stage-2 trainer; it needs the fixture `tiny_preset`."""
    values = {
        "output": str(folder),
        "vae": str(vae),
        "clips": 3,
        "clip_frames": 2,
        "validation_clips": 1,
        "sample_frames": 2,
        "sample_steps": 2,
        "adapter_gain": 1.0,
    }
    return from_dict(Stage2TrainingConfig, {**_RUN, **values, **settings})
