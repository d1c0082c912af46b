"""Flow in the cross-attention of ComfyUI's U-Net, by the same fusion as in the other engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.utils
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from torch import Tensor, nn

from ...s2dm.models import FlowAdapter

Block = tuple[str, int, int]
Patch = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def block_of(layer: str) -> Block:
    """The key under which core looks up a patch of a layer: "input_4_0" to ("input", 4, 0)."""
    part, number, index = layer.rsplit("_", 2)
    return part, int(number), int(index)


def cross_attention_layers(unet: nn.Module) -> dict[str, int]:
    """Name and inner width of each cross-attention layer of core's U-Net.

    Empty for anything that is not built like Stable Diffusion's U-Net, with one or several layers
    in a block (1.x, 2.x, SDXL).
    """
    return {name: width for name, width, _ in _layers(unet)}


def cross_attention_levels(unet: nn.Module) -> tuple[int, ...]:
    """How often the latents are halved where the layers are, finest first."""
    return tuple(sorted({level for *_, level in _layers(unet)}))


def _layers(unet: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, inner width and level of each cross-attention layer."""
    parts = {
        "input": getattr(unet, "input_blocks", ()),
        "middle": (getattr(unet, "middle_block", ()),),
        "output": getattr(unet, "output_blocks", ()),
    }
    level = 0
    for part, blocks in parts.items():
        for number, block in enumerate(blocks):
            for module in block or ():
                # A block ends in the layer that changes the size, or is nothing else.
                level += isinstance(module, Downsample) - isinstance(module, Upsample)
                for index, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                    attention = getattr(transformer, "attn2", None)
                    if attention is not None:
                        width = attention.heads * attention.dim_head
                        yield f"{part}_{number}_{index}", width, level


def with_flow(
    transformer_options: dict[str, Any],
    adapter: FlowAdapter,
    strength: float,
    tokens: Tensor,
    size: tuple[int, int],
    mask: Tensor | None,
) -> dict[str, Any]:
    """A copy of core's transformer options in which each layer of the adapter sees the flow.

    Patches that other nodes have put there still run: they get our keys and values.

    Args:
        transformer_options: of the call; not changed.
        adapter, strength: the strength multiplies what a layer gets of the flow.
        tokens: (B, tokens, width), for the B samples of the call.
        size: height and width of the latents of the call.
        mask: (B, 1, h, w), 1 where a place of the picture sees these tokens, 0 where it sees
            the null tokens; None for everywhere.
    """
    replace = transformer_options.get("patches_replace", {})
    patches = dict(replace.get("attn2", {}))
    for layer, _ in adapter.config.layers:
        block = block_of(layer)
        # A patch may be meant for one transformer of a block or, as core allows, for all.
        previous = patches.get(block, patches.get(block[:2]))
        patches[block] = _FlowPatch(adapter, layer, strength, tokens, size, mask, previous)
    return {**transformer_options, "patches_replace": {**replace, "attn2": patches}}


@dataclass(eq=False)
class _FlowPatch:
    """Replaces the attention of one layer in one call of the U-Net."""

    adapter: FlowAdapter
    layer: str
    strength: float
    tokens: Tensor
    size: tuple[int, int]
    mask: Tensor | None
    previous: Patch | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        out = self._attend(q, k, v, self.tokens, extra_options)
        if self.mask is None:
            return out
        null = self.adapter.null_tokens(1, self.size).to(self.tokens).expand(len(q), -1, -1)
        share = self._mask_of_queries(q, extra_options)
        return share * out + (1 - share) * self._attend(q, k, v, null, extra_options)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, extra_options: dict[str, Any]
    ) -> Tensor:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return optimized_attention(
                query,
                key,
                value,
                extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )

        def of_prompt(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Another node's patch adds something of its own, so it runs once: on the prompt.
            if self.previous is not None:
                return self.previous(query, key, value, extra_options)
            return attention(query, key, value)

        return self.adapter.attend(
            self.layer, q, k, v, tokens, self.size, of_prompt, self.strength, attention
        )

    def _mask_of_queries(self, q: Tensor, extra_options: dict[str, Any]) -> Tensor:
        height, width = extra_options["activations_shape"][-2:]
        mask = comfy.utils.common_upscale(self.mask, width, height, "area", "disabled")
        return mask.flatten(2).transpose(1, 2).to(q)
