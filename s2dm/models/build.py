"""Build the networks of a checkpoint with diffusers and transformers.

ComfyUI runs the same weights through its own classes; this is the other engine, and the one
that trains. State dictionaries are in the file's (ldm) keys, without the part's prefix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .adapter import FlowAdapter, fuse_attention
from .config import (
    FlowAdapterConfig,
    FlowGeneratorConfig,
    S2DMConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from .flow_generator import FlowGenerator
from .keys import attention_names, text_encoder_keys, to_diffusers, to_ldm, unet_keys, vae_keys
from .tokenizer import write_tokenizer

State = Mapping[str, Tensor]


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


def build_flow_adapter(config: FlowAdapterConfig, state: State | None = None) -> FlowAdapter:
    """Build the flow adapter, untrained (and without effect) if there is no state."""
    adapter = FlowAdapter(config)
    if state is not None:
        adapter.load_state_dict(dict(state))
    return adapter


def build_flow_generator(config: FlowGeneratorConfig, state: State | None = None) -> FlowGenerator:
    """Build the flow generator, with random weights if there is no state."""
    generator = FlowGenerator(config)
    if state is not None:
        generator.load_state_dict(dict(state))
    return generator


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
    """Transformers 4 wraps the layers in ``text_model``, transformers 5 does not."""
    return hasattr(encoder, "text_model")


def attach_adapter(unet: UNet2DConditionModel, adapter: FlowAdapter) -> None:
    """Let the U-Net's cross-attention read flow tokens.

    From then on ``unet(..., cross_attention_kwargs={"flow_tokens": tokens})`` takes tokens
    (N, 77, width), and ``"flow_strength"`` (1 by default) scales their effect. Without tokens
    the U-Net works as before. The adapter stays a module of its own: the U-Net does not
    register it, so move, train and save it beside the U-Net. Layers that the adapter leaves out
    see the prompt alone.

    Raises:
        ValueError: if the adapter has layers that the U-Net has not, or of another width.
    """
    names = attention_names(unet_config(unet))
    widths = {
        names[path]: module.inner_dim
        for path, module in unet.named_modules()
        if isinstance(module, Attention) and path in names
    }
    expected, got = widths, dict(adapter.config.layers)
    if not got.items() <= expected.items():
        raise ValueError(
            f"flow adapter: expected layers {expected}, got {got}. "
            "The adapter was made for another U-Net."
        )
    layers = {f"{path}.processor": name for path, name in names.items() if name in got}
    unet.set_attn_processor(
        {path: FlowAttentionProcessor(adapter, layers.get(path)) for path in unet.attn_processors}
    )


def is_attached(unet: UNet2DConditionModel, adapter: FlowAdapter) -> bool:
    """Whether the U-Net still reads this adapter: other settings may have put theirs there."""
    return all(
        isinstance(processor, FlowAttentionProcessor) and processor.adapter is adapter
        for processor in unet.attn_processors.values()
    )


def unet_config(unet: UNet2DConditionModel) -> UNetConfig:
    """Read the config back from a diffusers U-Net of the Stable Diffusion 1.x kind.

    Raises:
        ValueError: if it is of another kind.
    """
    settings = unet.config
    widths = tuple(settings.block_out_channels)
    plain = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    if not set(settings.down_block_types) <= set(plain) or not isinstance(
        settings.attention_head_dim, int
    ):
        raise ValueError(
            "U-Net: expected one of the Stable Diffusion 1.x kind, got blocks "
            f"{settings.down_block_types} with heads {settings.attention_head_dim}."
        )
    return UNetConfig(
        in_channels=settings.in_channels,
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=settings.layers_per_block,
        attention_levels=tuple(plain[kind] for kind in settings.down_block_types),
        num_heads=settings.attention_head_dim,
        context_dim=settings.cross_attention_dim,
    )


class FlowAttentionProcessor:
    """Attention of one layer; cross-attention adds the flow's keys and values if given any."""

    def __init__(self, adapter: FlowAdapter, layer: str | None) -> None:
        self.adapter = adapter
        self.layer = layer  # None: self-attention, or a layer that the adapter leaves out

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        flow_tokens: Tensor | None = None,
        flow_strength: float = 1.0,
    ) -> Tensor:
        """Attend from (B, pixels, C) to itself or to the prompt (B, length, context)."""
        if attention_mask is not None:
            raise ValueError(
                "flow adapter: expected no attention mask: Stable Diffusion 1.x has none."
            )
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        if self.layer is None or flow_tokens is None:
            out = attend(q, k, v)
        else:
            flow_k, flow_v = self.adapter.keys_values(self.layer, flow_tokens)
            if flow_strength != 1.0:
                flow_k, flow_v = flow_k * flow_strength, flow_v * flow_strength
            out = fuse_attention(q, k, v, flow_k, flow_v, self.adapter.config.fusion, attend)
        return attn.to_out[1](attn.to_out[0](out))
