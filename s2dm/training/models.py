"""Checkpoints for the trainers: presets, starting weights, and what a run writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import S2DMConfig, VAEConfig, presets
from ..models.checkpoint import Checkpoint, load_checkpoint, parts_of, save_checkpoint
from ..models.keys import to_ldm, vae_keys
from ..pipelines.modules import build_vae, to_checkpoint
from ..settings import SettingsError
from .cpu import speed_up


def preset(name: str) -> S2DMConfig:
    """The configuration that `s2dm.models.presets` calls `NAME`."""
    config = getattr(presets, name.upper(), None)
    if not isinstance(config, S2DMConfig):
        known = [
            key.lower() for key, value in vars(presets).items() if isinstance(value, S2DMConfig)
        ]
        raise SettingsError(f"unknown preset {name!r}; known: {', '.join(known)}.")
    return config


def load_model(path: str | Path, parts: Iterable[str] | None = None) -> Checkpoint:
    """A checkpoint, or some parts of it, with float32 weights to go on from."""
    found = load_checkpoint(path, parts)
    states = {
        part: {key: value.float() for key, value in state.items()}
        for part, state in found.states.items()
    }
    return Checkpoint(found.config, states)


def frozen_vae(config: VAEConfig, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The VAE that makes the latents of a run and doesn't learn in it."""
    vae = build_vae(config, state).requires_grad_(False).eval().to(device)
    if device.type == "cpu":
        speed_up(vae)
    return vae


def save_vae(path: Path, config: VAEConfig, state: Mapping[str, Tensor]) -> None:
    """Write a VAE alone, float32; `state` is in diffusers' keys."""
    weights = {"vae": to_ldm(state, vae_keys(config))}
    save_checkpoint(path, Checkpoint(S2DMConfig(vae=config), weights))


def save_model(
    path: Path,
    config: S2DMConfig,
    modules: Mapping[str, nn.Module],
    others: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a model in half precision: trained `modules`, and the `others` as read."""
    states = {**others, **to_checkpoint(config, modules).states}
    if missing := set(parts_of(config)) - set(states):
        raise ValueError(
            f"not exported: expected weights of {', '.join(sorted(missing))}, got none."
        )
    save_checkpoint(path, Checkpoint(config, states), torch.float16)
