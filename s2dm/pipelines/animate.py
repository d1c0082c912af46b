"""Anchored rays for pipelines that know nothing of S2DM: any picture, any Stable Diffusion."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ..flow import FlowField
from ..models import whole_cells
from ..sector import (
    ANCHOR_END,
    SHARED,
    Anchor,
    NoiseLevels,
    NoiseSharing,
    ReferenceStates,
    StepNoise,
    implied_prediction,
    predicted_x0,
    release,
    release_levels,
)
from .pictures import on_canvas, picture_of


@torch.no_grad()
def animate(
    pipeline: DiffusionPipeline,
    prompt: str | None,
    reference: Any,
    flow: FlowField,
    seed: int | None = None,
    anchor_end: float = ANCHOR_END,
    strength: float = 1.0,
    reference_attention: bool = True,
    noise_sharing: NoiseSharing = SHARED,
    chunk_size: int = 8,
    **options: Any,
) -> Any:
    """Make a clip in which the flow takes a picture along, with a pipeline of yours.

    Nothing is trained: every frame is sampled as a picture of its own, anchored to where the flow
    takes the reference. The pipeline itself stays as it is.

    Args:
        pipeline: `StableDiffusionPipeline`, `StableDiffusionXLPipeline`, or another one with a
            U-Net that predicts ε or v and a VAE of pictures.
        prompt: what the clip shows; let it describe the reference. None where `options` holds
            `prompt_embeds`.
        reference: frame 1, a PIL image or (3, H, W) in [0, 1]; scaled to cover the clip, and
            cropped at the centre.
        flow: backward flow of every frame to the first; its size is that of the clip, in whole
            cells of the pipeline's latents.
        seed: of the noise; random if None.
        anchor_end: how far through the noise schedule frames are anchored, above 0 to 1.
        strength: of the anchor, 0 to 1.
        reference_attention: whether every frame also sees frame 1 in self-attention.
        noise_sharing: how the frames share their noise, at the start and at every step.
        chunk_size: how many frames the networks see at a time.
        options: further arguments of the pipeline, such as `num_inference_steps`.

    Returns:
        What the pipeline returns; its pictures are the frames.

    Raises:
        ValueError: the pipeline has another kind of network, or the flow another size.
    """
    unet, vae, scheduler = (getattr(pipeline, part, None) for part in ("unet", "vae", "scheduler"))
    if unet is None or vae is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "Expected a pipeline with a U-Net, a VAE and a scheduler of a diffusion process, such "
            f"as StableDiffusionPipeline, got {type(pipeline).__name__}."
        )
    cell = 2 ** (len(vae.config.block_out_channels) - 1)
    size = (flow.height, flow.width)
    whole = tuple(whole_cells(side, cell) for side in size)
    if whole != size:
        raise ValueError(
            f"flow: expected sides that are multiples of {cell} pixels, got {size[1]}x{size[0]}. "
            f"Resize it: flow.resize({whole[0]}, {whole[1]})."
        )
    device, dtype = pipeline._execution_device, vae.dtype

    def encode(frames: Tensor) -> Tensor:
        latents = vae.encode(frames.to(device, dtype) * 2 - 1).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents.float() - shift) * vae.config.scaling_factor

    picture = on_canvas(picture_of(reference, *size), cell)
    anchor = Anchor.of(picture, flow, encode, strength, chunk_size)
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    noise = noise_sharing.draw(len(flow), anchor.latents.shape[1:], generator)
    frames = _Frames(unet, scheduler, anchor, anchor_end, reference_attention, chunk_size)
    anchored = _like(pipeline, unet=frames)
    with frames.attention(), StepNoise(len(flow), generator, noise_sharing):
        return anchored(
            prompt=prompt,
            height=size[0],
            width=size[1],
            num_images_per_prompt=len(flow),
            latents=noise.to(device, unet.dtype).contiguous(),
            **options,
        )


def _like(pipeline: DiffusionPipeline, **modules: Any) -> DiffusionPipeline:
    """A pipeline of the same parts and settings, but for these modules."""
    settings = inspect.signature(type(pipeline).__init__).parameters
    kept = {name: pipeline.config[name] for name in settings if name in pipeline.config}
    return type(pipeline)(**{**kept, **pipeline.components, **modules})


class _Frames(nn.Module):
    """A U-Net that sees a clip a few frames at a time, and whose guess is anchored.

    To the pipeline it is the U-Net itself. The anchor acts on the prediction of each condition:
    that equals acting on what guidance makes of them, because guidance weighs them by numbers
    whose sum is 1.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        anchor: Anchor,
        end: float,
        reference_attention: bool,
        chunk_size: int,
    ) -> None:
        super().__init__()
        self.unet = unet
        self._prediction_type = scheduler.config.prediction_type
        self._levels = NoiseLevels(scheduler.alphas_cumprod)
        self._released = release_levels(end, self._levels.sigma)
        self._anchor = anchor
        self._sees_reference = reference_attention
        self._chunk_size = chunk_size
        self._states = ReferenceStates()
        self._call = (1, True)  # conditions side by side, and whether frame 1 is among the frames

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """While it lasts, self-attention also sees frame 1."""
        before = dict(self.unet.attn_processors)
        if self._sees_reference:
            self.unet.set_attn_processor(
                {name: _BesideFrame1(processor, self) for name, processor in before.items()}
            )
        try:
            yield
        finally:
            self.unet.set_attn_processor(before)

    def beside(self, attn: Any, states: Tensor) -> Tensor:
        groups, first = self._call
        return torch.cat([states, self._states.beside(attn, states, groups, first)], dim=1)

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """As the U-Net, for conditions · N samples."""
        count = len(self._anchor.latents)
        groups, batch = len(sample) // count, len(sample)
        as_tuple = kwargs.pop("return_dict", True) is False
        prediction = None
        for frames in torch.arange(count).split(self._chunk_size):
            rows = torch.cat([group * count + frames for group in range(groups)])
            cut = partial(_cut, rows=rows, batch=batch)
            self._call = (groups, bool(frames[0] == 0))
            part = self.unet(
                sample[rows], cut(timestep), *map(cut, args), **cut(kwargs), return_dict=False
            )[0]
            if prediction is None:
                prediction = part.new_empty(batch, *part.shape[1:])
            prediction[rows] = part
        prediction = self._pulled(prediction, sample[:, : prediction.shape[1]], timestep, groups)
        return (prediction,) if as_tuple else UNet2DConditionOutput(sample=prediction)

    def _pulled(self, prediction: Tensor, x_t: Tensor, timestep: Any, groups: int) -> Tensor:
        sigma = self._levels.sigma_at(float(torch.as_tensor(timestep).flatten()[0]))
        known = (x_t.float(), torch.tensor(1 / (sigma**2 + 1)), self._prediction_type)
        guess = predicted_x0(prediction.float(), *known).unflatten(0, (groups, -1))
        weight = release(sigma, *self._released)
        pulled = torch.cat([self._anchor.pull(one, weight) for one in guess])
        return implied_prediction(pulled, *known).to(prediction)


class _BesideFrame1:
    """A layer's own attention, with frame 1 beside the keys and values of self-attention."""

    def __init__(self, processor: Any, frames: _Frames) -> None:
        self.processor = processor
        self.frames = frames

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None:
            encoder_hidden_states = self.frames.beside(attn, hidden_states)
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def _cut(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of whatever is given for each sample of a batch, also inside of containers."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(item, rows, batch) for item in value)
    if type(value) is dict:
        return {key: _cut(item, rows, batch) for key, item in value.items()}
    return value
