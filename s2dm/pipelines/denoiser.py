"""The prediction of a step: frames a few at a time, guided by prompt and flow, and anchored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..models import SamplingConfig
from ..sector import (
    Anchor,
    NoiseLevels,
    ReferenceStates,
    guide,
    implied_prediction,
    predicted_x0,
    release,
    release_levels,
)
from .attention import Beside

Label = tuple[Tensor, Tensor]
"""Text (1, L, d) and flow tokens (N, tokens, width) that a prediction is made under."""


class Denoiser:
    """ε_θ of all frames of one clip, for `sample`.

    Args:
        unet: with the flow adapter attached.
        scheduler: of the noise levels.
        labels: of each prediction that guidance weighs, see `guidance_scales`.
        null_tokens: (N, tokens, width), in place of the flow's where it doesn't act.
        sampling: guidance, start of the flow and anchor.
        chunk_size: frames that the U-Net sees at a time.
        anchor: to frame 1; None for none.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        labels: Sequence[Label],
        null_tokens: Tensor,
        sampling: SamplingConfig,
        chunk_size: int,
        anchor: Anchor | None = None,
    ) -> None:
        self.unet, self.scheduler = unet, scheduler
        self.labels = labels
        self.without_flow = [(text, null_tokens) for text, _ in labels]
        self.sampling, self.chunk_size, self.anchor = sampling, chunk_size, anchor
        self._levels = NoiseLevels(scheduler.alphas_cumprod)
        self._flow_from = self._levels.timestep(sampling.flow_start)
        self._released = release_levels(sampling.anchor_end, self._levels.sigma)
        self._states = ReferenceStates()

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents (N, C, h, w) as the scheduler scales them to a prediction of their shape."""
        acts = bool(self.sampling.flow_start < 1 and timestep <= self._flow_from)
        labels = self.labels if acts else self.without_flow
        # Equal frames stay equal until something tells them apart: one is enough.
        several = not _all_equal(latents, *(tokens for _, tokens in labels))
        prediction = torch.empty_like(latents if several else latents[:1])
        for frames in torch.arange(len(prediction)).split(self.chunk_size):
            reference = None
            if self.sampling.reference_attention and several:
                first = frames[0] == 0
                reference = partial(self._states.beside, groups=len(labels), first=first)
            prediction[frames] = self._guided(
                predict(self.unet, latents[frames], timestep, labels, frames, reference)
            )
        prediction = prediction.expand_as(latents)
        return self._anchored(prediction, latents, timestep) if acts else prediction

    def _guided(self, parts: list[Tensor]) -> Tensor:
        scale, flow_scale = guidance_scales(self.sampling)
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            return guide(*parts, scale)
        return guide(parts[0], parts[2], scale, parts[1], flow_scale)

    def _anchored(self, prediction: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """Not the prediction of each label, because guidance overshoots."""
        if self.anchor is None:
            return prediction
        sigma = self._levels.sigma_at(timestep)
        kind = self.scheduler.config.prediction_type
        known = (latents, torch.tensor(1 / (sigma**2 + 1)), kind)
        weight = release(sigma, *self._released)
        guess = self.anchor.pull(predicted_x0(prediction, *known), weight)
        return implied_prediction(guess, *known)


def guidance_scales(sampling: SamplingConfig) -> tuple[float, float | None]:
    """Scales of prompt and flow; the flow's is None where one scale guides both.

    Two predictions are enough for one scale, three are needed for two.
    """
    scale, flow_scale = sampling.guidance_scale, sampling.flow_guidance_scale
    return scale, None if flow_scale == scale else flow_scale


def predict(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: Tensor,
    labels: Sequence[Label],
    frames: Tensor,
    reference: Beside | None = None,
) -> list[Tensor]:
    """ε_θ of the same frames under each of the labels, as one batch, in the latents' type."""
    text = torch.cat([text.expand(len(frames), -1, -1) for text, _ in labels])
    tokens = torch.cat([tokens[frames] for _, tokens in labels])
    flow = {"flow_tokens": tokens, "flow_size": tuple(latents.shape[-2:])}
    prediction = unet(
        latents.to(unet.dtype).repeat(len(labels), 1, 1, 1),
        timestep,
        encoder_hidden_states=text,
        cross_attention_kwargs={**flow, "reference": reference},
    ).sample
    return list(prediction.to(latents.dtype).chunk(len(labels)))


def _all_equal(*parts: Tensor) -> bool:
    """Whether the rows of each of the tensors equal its first one."""
    return all(bool((part == part[:1]).all()) for part in parts)
