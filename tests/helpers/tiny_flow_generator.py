"""A flow generator with small random weights, and inputs for it."""

import dataclasses
from typing import Any

import torch
from random_checkpoint import TINY
from torch import Tensor

from s2dm.models import FlowGenerator, FlowGeneratorConfig

SMALL = TINY.flow_generator


def make(
    config: FlowGeneratorConfig = SMALL, disturbed: bool = True, **changes: Any
) -> FlowGenerator:
    """A network; disturbed, so that nothing is zero merely because it starts at zero."""
    torch.manual_seed(0)
    net = FlowGenerator(dataclasses.replace(config, **changes)).eval()
    if disturbed:
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return net


def draw(
    config: FlowGeneratorConfig = SMALL,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 6,
) -> dict[str, Tensor]:
    """The arguments of a call, random."""
    torch.manual_seed(1)
    arguments = {
        "sample": torch.randn(batch, frames, 3, height, width),
        "timesteps": torch.arange(batch) * 300 + 5,
        "reference": torch.randn(batch, config.reference_channels, height, width),
        "text": torch.randn(batch, config.text_dim),
    }
    if config.motion_strength:
        arguments["motion"] = torch.linspace(0.01, 0.05, batch)
    return arguments


def on_meta(config: FlowGeneratorConfig) -> FlowGenerator:
    """A network without weights."""
    with torch.device("meta"):
        return FlowGenerator(config)


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()
