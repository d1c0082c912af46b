"""Small prepared clips, without a VAE or a text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from s2dm.data import Clip
from s2dm.data.prepared import Encoders, PreparedClips, Source, prepare_clips
from s2dm.flow import FlowField

SIZE, LENGTH, WIDTH = 32, 77, 64


def moving_clip(number: int, frames: int = 4, size: int = SIZE) -> Clip:
    """A square that moves a pixel a frame."""
    generator = torch.Generator().manual_seed(number)
    colour = torch.rand(3, 1, 1, generator=generator)
    pixels = torch.full((frames, 3, size, size), 0.5)
    moved = torch.zeros(frames, 2, size, size)
    for frame in range(frames):
        left = 4 + frame % 8
        pixels[frame, :, 8:20, left : left + 12] = colour
        moved[frame, 0, 8:20, left : left + 12] = -(frame % 8)
    flow = FlowField(moved, torch.zeros(frames, 1, size, size))
    return Clip(pixels, flow, f"square number {number}")


def sources(count: int, frames: int = 4) -> list[Source]:
    return [
        Source(f"clip {number}", f"{number} {frames}", lambda n=number: moving_clip(n, frames))
        for number in range(count)
    ]


def encoders(channels: int = 4, width: int = WIDTH) -> Encoders:
    """Latents are means of 8x8 pixels, text states random numbers that the caption seeds."""

    def latents(frames: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(frames, 8) * 4 - 2
        return torch.cat([small, small.mean(1, keepdim=True).expand(-1, channels - 3, -1, -1)], 1)

    def text(caption: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, caption)))
        return torch.randn(LENGTH, width, generator=generator)

    return Encoders(latents, text)


def write_clips(
    folder: Path, count: int = 3, frames: int = 4, channels: int = 4, width: int = WIDTH
) -> PreparedClips:
    return prepare_clips(folder, sources(count, frames), count, encoders(channels, width))
