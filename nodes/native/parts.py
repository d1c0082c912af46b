"""Parts of different checkpoints, named before they meet as tensors that don't fit."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.sd
from torch import Tensor


class PartsError(ValueError):
    """Latents, prompts, a VAE or a MODEL that don't belong together."""


class CheckedVAE(comfy.sd.VAE):
    """Core's VAE, which says what to do with latents that aren't its own.

    Encode Flow can't know the model: its empty latents become the model's in any sampler, and
    come here as they are if the sampler is bypassed.
    """

    def decode(self, samples_in: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check(samples_in)
        return super().decode(samples_in, *args, **kwargs)

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check(samples)
        return super().decode_tiled(samples, *args, **kwargs)

    def _check(self, latents: Tensor) -> None:
        if latents.shape[1] != self.latent_channels:
            raise PartsError(
                f"S2DM VAE: expected latents of {self.latent_channels} channels, got "
                f"{tuple(latents.shape)}. Decode what a sampler gives with the MODEL of the same "
                "checkpoint; the LATENT of Encode Flow (S2DM) is empty and has to be sampled "
                "first, so don't bypass the sampler."
            )


def check_parts(
    model: comfy.model_patcher.ModelPatcher,
    conditions: dict[str, list[dict[str, Any]]],
    latents: Tensor,
) -> None:
    """Check what a sampler is about to put together.

    Args:
        model: to sample with.
        conditions: of the guider, by name.
        latents: (N, C, h, w), or noise like them.

    Raises:
        PartsError: latents or prompts of another model.
    """
    channels = model.get_model_object("latent_format").latent_channels
    if latents.shape[1] != channels:
        raise PartsError(
            f"S2DM: expected latents of {channels} channels, as the MODEL has them, got "
            f"{tuple(latents.shape)}. Encode pictures with the VAE of the MODEL's checkpoint, or "
            "sample the LATENT of Encode Flow (S2DM)."
        )
    width = model.model.model_config.unet_config.get("context_dim")
    for entries in conditions.values():
        for text in (entry.get("cross_attn") for entry in entries):
            if isinstance(width, int) and text is not None and text.shape[-1] != width:
                raise PartsError(
                    f"S2DM: expected prompts of width {width}, as the MODEL reads them, got "
                    f"{tuple(text.shape)}. Connect CLIP Text Encode to the CLIP of the MODEL's "
                    "checkpoint."
                )
