"""The flow in the attention of a diffusers U-Net."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from ..models import FlowAdapter, UNetConfig
from ..models.keys import attention_names

Beside = Callable[[Hashable, Tensor], Tensor]
"""Takes a self-attention layer and its input; gives the states of frame 1 for each row."""


def attach_adapter(unet: UNet2DConditionModel, adapter: FlowAdapter) -> None:
    """Let the U-Net's cross-attention read flow tokens.

    From then on `unet(..., cross_attention_kwargs={"flow_tokens": tokens})` takes tokens
    (N, tokens, width), with "flow_size", the latents' (height, width), which spatial features need,
    and as "reference" what `ReferenceStates.beside` gives, with its other arguments bound. Without
    them the U-Net works as before. The adapter stays a module of its own: the U-Net does not
    register it, so move, train and save it beside the U-Net. Layers that the adapter leaves out see
    the prompt alone.

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
    """Attention of one layer; in cross-attention the adapter joins the flow, if given any."""

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
        flow_size: tuple[int, int] | None = None,
        reference: Beside | None = None,
    ) -> Tensor:
        """Attend from (B, pixels, C) to itself or to the prompt (B, length, context)."""
        if attention_mask is not None:
            raise ValueError(
                "flow adapter: expected no attention mask: Stable Diffusion 1.x has none."
            )
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is None and reference is not None:
            source = torch.cat([source, reference(attn, hidden_states)], dim=1)
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        if self.layer is None or flow_tokens is None:
            out = attend(q, k, v)
        else:
            out = self.adapter.attend(self.layer, q, k, v, flow_tokens, flow_size, attend)
        return attn.to_out[1](attn.to_out[0](out))
