"""Previews in the right colours, for latents that aren't those of Stable Diffusion."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.latent_formats
import comfy.sd
import torch

from ...s2dm.models import VAEConfig

_SHADES = (0.1, 0.5, 0.9)
_SIZE = 32


def fit_preview(
    latent_format: comfy.latent_formats.LatentFormat, config: VAEConfig, vae: comfy.sd.VAE
) -> None:
    """Find how latents map to colours, from flat pictures that the VAE encodes.

    Core shows latents during sampling as a linear map of their channels to red, green and blue,
    which it knows for Stable Diffusion. A VAE of Stable Diffusion's sizes is taken for one.

    Args:
        latent_format: of the loaded model; changed in place.
        config, vae: the autoencoder that goes with it.
    """
    if _sizes(config) == _sizes(VAEConfig()):
        return
    colours = torch.tensor(list(itertools.product(_SHADES, repeat=3)))
    pictures = colours[:, None, None].expand(-1, _SIZE, _SIZE, -1)
    with torch.no_grad():
        latents = latent_format.process_in(vae.encode(pictures)).cpu()
    flat = latents.mean(dim=(2, 3))
    one = torch.ones(len(flat), 1)
    # Previews are in [-1, 1], as the VAE's output is.
    solution = torch.linalg.lstsq(torch.cat([flat, one], dim=1), 2 * colours - 1).solution
    latent_format.latent_rgb_factors = solution[:-1].tolist()
    latent_format.latent_rgb_factors_bias = solution[-1].tolist()
    latent_format.taesd_decoder_name = None


def _sizes(config: VAEConfig) -> tuple[Any, ...]:
    return config.channels, config.channel_mult, config.latent_channels
