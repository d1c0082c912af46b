"""A tiny model with random weights, for tests that ask whether things run, not how they look."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from s2dm.models import (
    PARTS,
    Checkpoint,
    FlowAdapterConfig,
    FlowGeneratorConfig,
    S2DMConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    save_checkpoint,
    train_tokenizer,
    with_tokenizer,
)

CAPTIONS = ("a man wearing a red coat and blue jeans is squat", "a man in a red shirt is walking")

UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(True, True),
    num_heads=2,
    context_dim=64,
)
TINY = with_tokenizer(
    S2DMConfig(
        unet=UNET,
        vae=VAEConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1),
        text_encoder=TextEncoderConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128),
        flow_adapter=FlowAdapterConfig.for_unet(UNET, width=32, hidden=32),
        flow_generator=FlowGeneratorConfig(
            reference_channels=4,
            text_dim=64,
            model_channels=16,
            channel_mult=(1, 2),
            num_heads=2,
            head_dim=8,
            norm_groups=4,
            norm="frame",
            upsample="nearest",
            null_reference="learned",
            null_text="learned",
            motion_strength=True,
            size=(16, 16),
            frames=4,
            displacement_scale=0.25,
            motion=0.02,
            schedule=ScheduleConfig(beta_schedule="cosine", prediction_type="v_prediction"),
            threshold=0.0,
        ),
        resolution=(64, 48),
        frames=4,
        licence="none: random numbers",
    ),
    train_tokenizer(CAPTIONS, 600),
)
"""All parts of a checkpoint, as small as they get."""


def tiny_config(fusion: str = "channel", **changes: Any) -> S2DMConfig:
    """`TINY` with another fusion, or without some part (`flow_generator=None`)."""
    adapter = dataclasses.replace(TINY.flow_adapter, fusion=fusion)
    return dataclasses.replace(TINY, flow_adapter=adapter, **changes)


def write_random_checkpoint(path: Path, config: S2DMConfig = TINY, seed: int = 0) -> Path:
    """Write random weights for `config`."""
    save_checkpoint(path, Checkpoint(config, random_states(config, seed)))
    return path


def random_states(config: S2DMConfig, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of every part that `config` has, under the file's keys."""
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for name, part in PARTS.items():
        if getattr(config, name) is not None:
            keys = part.keys(getattr(config, name))
            states[name] = {key.ldm: random_weight(key.ldm_shape, generator) for key in keys}
    return states


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers, scaled so that nothing grows without bound."""
    if len(shape) < 2:  # a bias or a norm's scale: near one serves both
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    inputs = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) / inputs**0.5
