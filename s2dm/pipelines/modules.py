"""The networks of a checkpoint as modules of diffusers and transformers.

ComfyUI runs the same weights through its own classes; this is the other engine, and the one
that trains. State dictionaries are in the file's (ldm) keys, without the part's prefix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..models import (
    Checkpoint,
    FlowAdapter,
    FlowGenerator,
    RegionMotion,
    S2DMConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from ..models.bert import build_bert
from ..models.keys import text_encoder_keys, to_diffusers, to_ldm, unet_keys, vae_keys
from ..models.tokenizer import write_tokenizer

State = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def build_unet(config: UNetConfig, state: State | None = None) -> UNet2DConditionModel:
    """Build the U-Net, with random weights if there is no state."""
    levels = config.attention_levels
    down = tuple("CrossAttnDownBlock2D" if level else "DownBlock2D" for level in levels)
    up = tuple("CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(levels))
    unet = UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        # diffusers takes this for the number of heads, as in its Stable Diffusion 1.x configs
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.context_dim,
        norm_num_groups=32,
    )
    if state is not None:
        unet.load_state_dict(to_diffusers(state, unet_keys(config)))
    return unet


def build_vae(config: VAEConfig, state: State | None = None) -> AutoencoderKL:
    """Build the autoencoder, with random weights if there is no state."""
    levels = len(config.widths)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=32,
        scaling_factor=config.scaling_factor,
    )
    if state is not None:
        vae.load_state_dict(to_diffusers(state, vae_keys(config)))
    return vae


def build_text_encoder(config: TextEncoderConfig, state: State | None = None) -> CLIPTextModel:
    """Build the text encoder, with random weights if there is no state."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            hidden_act="quick_gelu",
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.eos_token_id,
        )
    )
    if state is not None:
        weights = to_diffusers(state, text_encoder_keys(config))
        drop = "" if _has_text_model(encoder) else "text_model."
        encoder.load_state_dict({name.removeprefix(drop): w for name, w in weights.items()})
    return encoder


def build_tokenizer(config: S2DMConfig) -> CLIPTokenizer:
    """Build the tokenizer of a checkpoint. Nothing is fetched: CLIP's own is in the package.

    Raises:
        ValueError: if the checkpoint has no tokenizer.
    """
    if config.tokenizer is None or config.text_encoder is None:
        raise ValueError("tokenizer: expected a checkpoint with a text encoder, got one without.")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(config.tokenizer, folder)
        return CLIPTokenizer.from_pretrained(
            folder, model_max_length=config.text_encoder.max_length
        )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Texts to token ids (B, max_length), padded and cut as CLIP does."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def ddim_scheduler(schedule: ScheduleConfig) -> DDIMScheduler:
    """The paper's sampler, with the timesteps that ComfyUI's "ddim" and "ddim_uniform" take."""
    return DDIMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        prediction_type=schedule.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=True,
        clip_sample=False,
    )


def _build_own(kind: type[M], config: Any, state: State | None = None) -> M:
    """Build a network of this project, untrained if there is no state."""
    network = kind(config)
    if state is not None:
        network.load_state_dict(dict(state))
    return network


build_flow_adapter = partial(_build_own, FlowAdapter)
build_flow_generator = partial(_build_own, FlowGenerator)
build_region_motion = partial(_build_own, RegionMotion)


def unet_state(unet: UNet2DConditionModel, config: UNetConfig) -> dict[str, Tensor]:
    """Return the U-Net's weights under the file's keys."""
    return to_ldm(unet.state_dict(), unet_keys(config))


def vae_state(vae: AutoencoderKL, config: VAEConfig) -> dict[str, Tensor]:
    """Return the autoencoder's weights under the file's keys."""
    return to_ldm(vae.state_dict(), vae_keys(config))


def text_encoder_state(encoder: CLIPTextModel, config: TextEncoderConfig) -> dict[str, Tensor]:
    """Return the text encoder's weights under the file's keys."""
    prefix = "" if _has_text_model(encoder) else "text_model."
    weights = {prefix + name: weight for name, weight in encoder.state_dict().items()}
    return to_ldm(weights, text_encoder_keys(config))


def _has_text_model(encoder: CLIPTextModel) -> bool:
    """Transformers 4 wraps the layers in `text_model`, transformers 5 does not."""
    return hasattr(encoder, "text_model")


class Engine(NamedTuple):
    """How a part becomes a module, and how the module's weights get back under the file's keys."""

    build: Callable[[Any, State | None], nn.Module]
    state: Callable[[Any, Any], dict[str, Tensor]]


def _own_state(module: nn.Module, config: Any) -> dict[str, Tensor]:
    return module.state_dict()


# A part has the name of its entry in S2DMConfig. A new part is one more row.
ENGINES: dict[str, Engine] = {
    "unet": Engine(build_unet, unet_state),
    "text_encoder": Engine(build_text_encoder, text_encoder_state),
    "vae": Engine(build_vae, vae_state),
    "flow_adapter": Engine(build_flow_adapter, _own_state),
    "flow_generator": Engine(build_flow_generator, _own_state),
    "region_motion": Engine(build_region_motion, _own_state),
    "flow_text_encoder": Engine(build_bert, _own_state),
}


def build(checkpoint: Checkpoint, part: str) -> nn.Module:
    """The module of a part of a checkpoint."""
    return ENGINES[part].build(*checkpoint[part])


def to_checkpoint(config: S2DMConfig, modules: Mapping[str, nn.Module]) -> Checkpoint:
    """Modules, by the names of their parts, as the checkpoint of a model."""
    states = {
        part: ENGINES[part].state(module, getattr(config, part)) for part, module in modules.items()
    }
    return Checkpoint(config, states)


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor, chunk_size: int = 8) -> Tensor:
    """Latents (N,C,h,w), where the autoencoder computes, as frames (N,3,H,W), float32 in [0,1] on
    the CPU."""
    frames = [
        vae.decode(part.to(vae.dtype)).sample.float().cpu().add_(1).div_(2)
        for part in latents.split(chunk_size)
    ]
    return torch.cat(frames).clamp_(0, 1)


@torch.no_grad()
def reconstruct(vae: nn.Module, pictures: Tensor, chunk_size: int = 8) -> Tensor:
    """(N,3,H,W) in [0,1] through the autoencoder, without posterior noise; float32 on the CPU."""
    height, width = pictures.shape[2:]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    # What is no whole latent cell would be dropped: the border is repeated up to the next one.
    pictures = F.pad(pictures, (0, -width % factor, 0, -height % factor), mode="replicate")
    latents = [
        vae.encode(part.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mode()
        for part in pictures.split(chunk_size)
    ]
    return decode(vae, torch.cat(latents), chunk_size)[..., :height, :width]
