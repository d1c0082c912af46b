"""Checkpoints for the trainers: presets, starting weights, and what a run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import presets
from ..models.build import build_vae, text_encoder_state, unet_state, vae_state
from ..models.checkpoint import load_checkpoint, save_checkpoint
from ..models.config import S2DMConfig, VAEConfig
from ..models.keys import to_ldm, vae_keys
from .config import TrainingConfigError
from .cpu import speed_up


def preset(name: str) -> S2DMConfig:
    """The configuration that ``s2dm.models.presets`` calls ``NAME``."""
    config = getattr(presets, name.upper(), None)
    if not isinstance(config, S2DMConfig):
        known = [
            key.lower() for key, value in vars(presets).items() if isinstance(value, S2DMConfig)
        ]
        raise TrainingConfigError(f"unknown preset {name!r}; known: {', '.join(known)}.")
    return config


def load_model(path: str | Path) -> tuple[S2DMConfig, dict[str, dict[str, Tensor]]]:
    """Config and float32 weights, by part, of a checkpoint to go on from."""
    config, states = load_checkpoint(path)
    return config, {part: _float(state) for part, state in states.items()}


def load_vae(path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """Config and float32 weights of the VAE in a checkpoint."""
    config, states = load_checkpoint(path, ["vae"])
    return config.vae, _float(states["vae"])


def load_text_encoder(path: str | Path) -> tuple[S2DMConfig, dict[str, Tensor]]:
    """Config (with the tokenizer) and float32 weights of the text encoder in a checkpoint."""
    config, states = load_checkpoint(path, ["text_encoder"])
    return config, _float(states["text_encoder"])


def frozen_vae(config: VAEConfig, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """The VAE that makes the latents of a run and doesn't learn in it."""
    vae = build_vae(config, state).requires_grad_(False).eval().to(device)
    if device.type == "cpu":
        speed_up(vae)
    return vae


def save_vae(path: Path, config: Any, state: Mapping[str, Tensor]) -> None:
    """Write a VAE alone, float32; ``state`` is in diffusers' keys."""
    save_checkpoint(path, S2DMConfig(vae=config), {"vae": to_ldm(state, vae_keys(config))})


_STATES = {
    "unet": unet_state,
    "text_encoder": text_encoder_state,
    "vae": vae_state,
    "flow_adapter": lambda module, config: module.state_dict(),
    "flow_generator": lambda module, config: module.state_dict(),
}


def save_model(
    path: Path,
    config: S2DMConfig,
    parts: Mapping[str, nn.Module],
    others: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a whole checkpoint in half precision: trained ``parts`` and the ``others`` as read."""
    states = dict(others)
    for name, module in parts.items():
        states[name] = _STATES[name](module, getattr(config, name))
    save_checkpoint(path, config, states, torch.float16)


def _float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items()}
