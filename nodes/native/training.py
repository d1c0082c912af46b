"""Core's model as a denoiser that an adapter learns on: frozen, and nothing of it changed.

A node runs in inference mode, and so do the loaders: no gradient can pass weights that were made
there. The training clone therefore wraps every weight in a function of core's own kind, which gets
a copy at each use, and cuts it off from the weight: the base can't learn, and has no gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.utils.checkpoint
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepBlock
from torch import Tensor, nn

from ...s2dm.data.prepared import Encoders, PreparedClips
from ...s2dm.models import FlowAdapter, FlowAdapterConfig, FlowGenerator
from ...s2dm.sector.diffusion import PREDICTION_TYPES
from ...s2dm.training.flow_adapter import AdapterTrainer, Denoiser
from ...s2dm.training.lora import LoRA, is_attention
from ...s2dm.training.trainer import TrainingError
from .adapter import AdapterError, adapter_config_for, prediction_of
from .attention import with_flow
from .compat import is_dynamic
from .stage1 import embed

PRECISIONS = ("auto", "fp32", "bf16")

_ACTIVATIONS = 3
"""How much more memory than sampling a training step takes, by core's estimate of sampling."""
_UNET = "diffusion_model."
_COPIES = 5
"""Of a network's weights that learns: itself, gradient, two moments, average."""
_PLACE = 1100
"""Bytes of a flow generator's step a clip, frame, cell and channel of its finest level, in fp32
and by measurement (`docs/train_your_own.md`)."""


def trainable_config(
    model: comfy.model_patcher.ModelPatcher, fusion: str, **sizes: Any
) -> FlowAdapterConfig:
    """The config of a new adapter that can be trained on a MODEL.

    Raises:
        AdapterError: none can be; it says which kind of MODEL this is.
    """
    config = adapter_config_for(model, fusion, **sizes)
    unet = model.get_model_object("diffusion_model")
    if unet.num_classes is not None:
        raise AdapterError(
            "expected a MODEL with the U-Net of Stable Diffusion 1.x or 2.x, got "
            f"{type(model.model).__name__}, which is also told a picture's size and the whole "
            "prompt's meaning (SDXL): its adapters can be used, but not trained yet. Load a Stable "
            "Diffusion 1.5 checkpoint."
        )
    channels = model.get_model_object("latent_format").latent_channels
    if unet.in_channels != channels:
        raise AdapterError(
            f"expected a MODEL that sees latents of {channels} channels alone, got one of "
            f"{unet.in_channels}: an inpainting or editing model. Train on the base model; the "
            "adapter then works on both."
        )
    return config


def schedule_of(model: comfy.model_patcher.ModelPatcher) -> tuple[Tensor, str]:
    """ᾱ_t of every timestep, (T,), and what the model predicts.

    Raises:
        AdapterError: the model is not one of diffusion in steps.
    """
    kind = prediction_of(model)
    sampling = model.get_model_object("model_sampling")
    if kind is None or not hasattr(sampling, "sigmas"):
        found = ", ".join(base.__name__ for base in type(sampling).__bases__)
        raise AdapterError(
            f"expected a MODEL that predicts {' or '.join(PREDICTION_TYPES)}, got one that is "
            f"sampled as {found}, such as one of flow matching. Load a Stable Diffusion 1.5 "
            "checkpoint, or take away what changes its sampling."
        )
    sigmas = sampling.sigmas.detach().float().cpu().clone()
    return 1 / (1 + sigmas.square()), kind


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """Name of the file that a MODEL comes from, without its ending.

    Newer versions of core keep how a MODEL is loaded again, with the path in front; where there is
    none the name is empty.
    """
    made = getattr(model, "cached_patcher_init", None)
    path = made[1][0] if made is not None else None
    return Path(path).stem if isinstance(path, str) else ""


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type in which a network computes; its weights stay as they are stored.

    Never float16, in which small gradients vanish.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    half = comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if half and device.type != "cpu" else torch.float32


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Out of the inference mode that nodes run in: what is made within can learn."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def frozen(
    model: comfy.model_patcher.ModelPatcher,
    adapter: FlowAdapter,
    clips: PreparedClips,
    rows: int,
    precision: str = "auto",
    checkpointing: bool = True,
    lora: LoRA | None = None,
) -> Iterator[Denoiser]:
    """A MODEL as a denoiser that tells the adapter's gradient and has none itself.

    Loaded by core's model management, at the end left as it was. LoRAs on the MODEL are part of
    it; what other nodes add while sampling is not.

    Args:
        model: with a U-Net that `trainable_config` takes.
        adapter: in float32; moved to the model's device.
        clips: of the model's VAE and text encoder.
        rows: frames of a call.
        precision: one of PRECISIONS.
        checkpointing: keep only the blocks' inputs, and compute their insides again on the way
            back: less memory, more time.
        lora: from `new_lora`, to learn beside the adapter; moved to the model's device.

    Raises:
        AdapterError: the clips were prepared with another VAE or text encoder.
    """
    _check_clips(model, clips)
    alpha_bars, kind = schedule_of(model)
    dtype = compute_dtype(model.load_device, precision)
    clone = _training_clone(model, checkpointing, lora)
    management = comfy.model_management
    needed = _ACTIVATIONS * clone.memory_required([rows, *clips.latent_shape])
    management.load_models_gpu([clone], memory_required=needed)
    device = clone.load_device
    adapter.to(device)
    if lora is not None:
        lora.to(device)
    unet = clone.model.diffusion_model
    size = (clips.latent_shape[1], clips.latent_shape[2])

    def predict(x_t: Tensor, t: Tensor, tokens: Tensor, text: Tensor) -> Tensor:
        options: dict[str, Any] = {"optimized_attention_override": _differentiable}
        options = with_flow(options, adapter, 1.0, tokens, size, None)
        return unet(
            x_t.to(dtype), t.float(), context=text.to(dtype), transformer_options=options
        ).float()

    latent_format = clone.get_model_object("latent_format")
    try:
        yield Denoiser(predict, alpha_bars, kind, device, latent_format.process_in, lora)
    finally:
        clone.detach()  # whoever uses the model next loads it without our functions


def new_lora(model: comfy.model_patcher.ModelPatcher, rank: int, seed: int) -> LoRA | None:
    """A LoRA for the attention of a MODEL; None for a rank of 0."""
    if not rank:
        return None
    unet = model.get_model_object("diffusion_model")
    layers = {name: layer for name, layer in unet.named_modules() if is_attention(name)}
    return LoRA({name: layer.weight.shape for name, layer in layers.items()}, rank, seed)


def _training_clone(
    model: comfy.model_patcher.ModelPatcher, checkpointing: bool, lora: LoRA | None
) -> comfy.model_patcher.ModelPatcher:
    # What a dynamic one lends for a call may be another weight when the gradient comes back.
    clone = model.clone(disable_dynamic=True) if is_dynamic(model) else model.clone()
    for name, module in clone.model.named_modules():
        for part in ("weight", "bias"):
            if getattr(module, part, None) is not None and hasattr(module, f"{part}_function"):
                layer = name.removeprefix(_UNET)
                learns = lora is not None and part == "weight" and layer in lora.names
                function = partial(lora.changed, layer) if learns else _constant
                clone.add_weight_wrapper(f"{name}.{part}", function)
    if checkpointing:
        for name, module in clone.model.named_modules():
            if _is_block(module):
                clone.add_object_patch(f"{name}.forward", _Checkpointed(module.forward))
    clone.patches_uuid = uuid4()
    return clone


def _is_block(module: nn.Module) -> bool:
    """A residual block or a transformer of core's U-Net."""
    if isinstance(module, comfy.ldm.modules.attention.SpatialTransformer):
        return True
    return isinstance(module, TimestepBlock) and not isinstance(module, nn.Sequential)


def _constant(weight: Tensor) -> Tensor:
    """What core calls with a copy of a weight at each use."""
    return weight.detach()


class _Checkpointed:
    """The forward of a block, whose insides are computed again when the gradient comes back."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # Core goes on to write into its options which block it is at.
        args = tuple(dict(part) if type(part) is dict else part for part in args)
        kwargs = {name: dict(part) if type(part) is dict else part for name, part in kwargs.items()}
        return torch.utils.checkpoint.checkpoint(
            self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )


def _differentiable(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention in place of the user's: not every one has a gradient."""
    kwargs.pop("transformer_options", None)
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _check_clips(model: comfy.model_patcher.ModelPatcher, clips: PreparedClips) -> None:
    channels = model.get_model_object("latent_format").latent_channels
    width = model.model.model_config.unet_config.get("context_dim")
    got = clips.latent_shape[0], clips.empty_text.shape[-1]
    if got != (channels, width):
        raise AdapterError(
            f"expected clips with latents of {channels} channels and prompts of width {width}, as "
            f"the MODEL has them, got {got[0]} and {got[1]}. Prepare the clips with the VAE and "
            "CLIP of the MODEL's checkpoint."
        )


def encoders(vae: comfy.sd.VAE, clip: comfy.sd.CLIP) -> Encoders:
    """Core's VAE and CLIP as what prepares clips."""

    def states(caption: str) -> Tensor:
        return clip.encode_from_tokens(clip.tokenize(caption))[0].float().cpu()

    length = len(states(""))

    def latents(frames: Tensor) -> Tensor:
        encoded = [vae.encode(part.movedim(1, -1)) for part in frames.split(8)]
        return torch.cat(encoded).float().cpu()

    # What is longer than a prompt of its usual length is cut, as by the other engine.
    return Encoders(latents, lambda caption: states(caption)[:length])


def caption_texts(clip: comfy.sd.CLIP, captions: list[str]) -> Tensor:
    """Captions as the flow generator reads them, (C, text_dim), of a kind that can learn."""
    with torch.no_grad():
        return torch.cat([embed(clip, caption).float().cpu() for caption in captions]).clone()


def check_vae(vae: comfy.sd.VAE, clips: PreparedClips) -> None:
    """Refuse clips of another VAE.

    Raises:
        TrainingError: their latents have other channels.
    """
    if clips.latent_shape[0] != vae.latent_channels:
        raise TrainingError(
            f"expected clips with latents of {vae.latent_channels} channels, as the VAE makes "
            f"them, got {clips.latent_shape[0]}. Prepare the clips with this VAE."
        )


@contextlib.contextmanager
def making_room(
    network: FlowGenerator, clips: int, precision: str
) -> Iterator[tuple[torch.device, torch.dtype]]:
    """A network on core's device while it learns; other models make room for it.

    Args:
        network: in float32.
        clips: that it computes at once.
        precision: one of PRECISIONS.

    Returns:
        The device, and the type to compute in.
    """
    device = comfy.model_management.get_torch_device()
    dtype = compute_dtype(device, precision)
    config = network.config
    weights = sum(weight.nbytes for weight in network.parameters())
    cells = math.prod(config.size) // config.patch**2
    places = clips * config.frames * cells * config.model_channels
    needed = _COPIES * weights + _PLACE * places * dtype.itemsize // 4
    comfy.model_management.free_memory(needed, device)
    try:
        network.to(device)
        yield device, dtype
    finally:
        network.to("cpu")


def preview(
    trainer: AdapterTrainer, latent_format: comfy.latent_formats.LatentFormat
) -> Tensor | None:
    """Frames of the first clip side by side, (3,h,w) in [0,1], as the adapter makes them now.

    In the rough colours that core shows while it samples; None where it knows none.
    """
    if latent_format.latent_rgb_factors is None:
        return None
    latents = trainer.sample().cpu().float()
    factors = torch.tensor(latent_format.latent_rgb_factors)
    colours = latents.movedim(1, -1) @ factors
    if (bias := getattr(latent_format, "latent_rgb_factors_bias", None)) is not None:
        colours = colours + torch.tensor(bias)
    frames = ((colours + 1) / 2).clamp(0, 1).movedim(-1, 1)
    return torch.cat(list(frames), dim=-1)
