"""The flow adapter: optical flow as a condition of a Stable Diffusion U-Net.

The paper (arXiv 2403.13408, section 3.3) joins the flow with the prompt's embedding along
the channels, ahead of cross-attention. Concatenation along channels is a sum after the
projection, `[tau; f] W = tau W_tau + f W_f`, so the U-Net keeps its own weights `W_tau`
and the adapter holds the flow encoder and `W_f` for K and V of each cross-attention layer.

These tokens are few, 18 pixels wide at 128x128, and no finer motion can be followed. Spatial fusion
has one for each pixel of every layer instead, and adds it to what cross-attention gives there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..flow import FlowField
from .config.adapter import FUSIONS, FlowAdapterConfig
from .config.networks import LATENT_CELL
from .flow_encoder import FlowEncoder, FlowPyramid, Size, level_sizes

_PIXELS_AT_ONCE = 2**18  # of conditions, whose octaves are many channels

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class FlowAdapter(nn.Module):
    """Flow encoder, learned null labels, and projections for each cross-attention layer.

    The projections are zero at the start: an untrained adapter changes nothing.

    Tokens are one tensor (N, tokens, width) whatever the fusion: first those of the grid, if it has
    them ("channel", "token"), then the features of each level, finest first ("spatial"). How many
    these are depends on the size of the latents, which therefore goes along.

    Args:
        config: sizes, fusion and layers.
        operations: where `Linear`, `Conv2d`, `GroupNorm` and `LayerNorm` come from.
            Another engine may pass layers that cast their weights at use.
        device, dtype: where and how to create the weights.
    """

    def __init__(
        self,
        config: FlowAdapterConfig,
        operations: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.width
        sides: tuple[str, ...] = ()
        self.encoder: FlowEncoder | None = None
        self.pyramid: FlowPyramid | None = None
        if config.attended:
            sides = ("to_k", "to_v")
            self.encoder = FlowEncoder(config, operations, device, dtype)
            self.null = nn.Parameter(torch.empty(1, config.tokens, width, **placed))
            nn.init.uniform_(self.null, -1.7, 1.7)  # as large as normalised tokens
        if config.spatial:
            sides += ("to_add",)
            self.pyramid = FlowPyramid(config, operations, device, dtype)
        self.layers = nn.ModuleDict()
        for name, inner in config.layers:
            layer = {side: operations.Linear(width, inner, bias=False, **placed) for side in sides}
            for projection in layer.values():
                nn.init.zeros_(projection.weight)
            self.layers[name] = nn.ModuleDict(layer)

    def condition_size(self, height: int, width: int) -> Size:
        """As `FlowAdapterConfig.condition_size`."""
        return self.config.condition_size(height, width)

    def encode(self, condition: Tensor) -> Tensor:
        """Turn flow conditions into tokens.

        Args:
            condition: (N, 3, h, w) of `condition_size`, as `FlowField.condition` makes it:
                displacement in half-frames and occlusion in [0, 1]. Without spatial features any
                size will do. The result has its dtype, which has to be that of the weights unless
                the operations cast them.

        Returns:
            (N, tokens, width)

        Raises:
            ValueError: if the condition has another shape.
        """
        if condition.ndim != 4 or condition.shape[1] != 3 or 0 in condition.shape:
            raise ValueError(
                "flow condition: expected (frames, 3, height, width), got "
                f"{tuple(condition.shape)}. Make it with FlowField.condition(height, width)."
            )
        if self.pyramid is not None and any(side % LATENT_CELL for side in condition.shape[2:]):
            raise ValueError(
                f"flow condition: expected {LATENT_CELL} pixels for each latent, as condition_size "
                f"gives them, got {tuple(condition.shape[2:])}."
            )
        encoders = (part for part in (self.encoder, self.pyramid) if part is not None)
        return torch.cat([encoder(condition) for encoder in encoders], dim=1)

    def tokens(self, field: FlowField, size: Size, like: Tensor | None = None) -> Tensor:
        """Encode a flow field to (N, tokens, width).

        At the size that the encoder works in, as in training: another way of getting there gives
        edges that the encoder has never seen.

        Args:
            field: of N frames and any size.
            size: height and width of the latents.
            like: the tokens get its type and device; those of the weights if None.
        """
        like = next(self.parameters()) if like is None else like
        height, width = self.condition_size(*size)
        frames = max(1, _PIXELS_AT_ONCE // (height * width))
        conditions = field.condition(height, width).split(frames)
        return torch.cat([self.encode(part.to(like)) for part in conditions])

    def null_tokens(self, n: int, size: Size | None = None) -> Tensor:
        """Return the learned null label, (n, tokens, width): no statement about motion.

        It is not the code of zero flow, which says that nothing moves.

        Args:
            n: how many times.
            size: height and width of the latents, for spatial features.
        """
        parts: list[Tensor] = [self.null] if self.encoder is not None else []
        if self.pyramid is not None:
            parts.append(self.pyramid.nulls(_known(size)))
        return torch.cat(parts, dim=1).expand(n, -1, -1)

    def attend(
        self,
        layer_name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: Tensor,
        size: Size | None,
        attention_fn: AttentionFunction,
        strength: float = 1.0,
        own_attention_fn: AttentionFunction | None = None,
    ) -> Tensor:
        """Cross-attention of a layer with the flow in it, for any engine's attention function.

        Args:
            layer_name: one of the layers of the config.
            q: queries (B, pixels, inner).
            k, v: the prompt's keys and values (B, length, inner).
            tokens: (B, tokens, width), from `tokens` or `null_tokens`.
            size: height and width of the latents; None will do without spatial features.
            attention_fn: `(q, k, v) -> out`, heads included, all of shape (B, *, inner).
            strength: multiplies what the layer gets of the flow.
            own_attention_fn: of the flow's tokens alone, if another one is to do that.

        Returns:
            (B, pixels, inner), ahead of the output projection.

        Raises:
            ValueError: if there is no such layer, or the sizes don't fit each other.
        """
        count = self.config.tokens if self.encoder is not None else 0
        if self.encoder is None:
            out = attention_fn(q, k, v)
        else:
            flow_k, flow_v = (
                strength * part.to(k) for part in self.keys_values(layer_name, tokens[:, :count])
            )
            fusion = self.config.attended
            out = fuse_attention(
                q, k, v, flow_k, flow_v, fusion, attention_fn, own_attention_fn or attention_fn
            )
        if self.pyramid is not None:
            features = self._of_level(tokens[:, count:], _known(size), q.shape[1])
            out = out + strength * self._layer(layer_name)["to_add"](features).to(out)
        return out

    def keys_values(self, layer_name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (N, tokens, width) to K and V of one layer, (N, tokens, inner) each.

        Raises:
            ValueError: if the adapter has no such layer.
        """
        layer = self._layer(layer_name)
        return layer["to_k"](tokens), layer["to_v"](tokens)

    def _layer(self, name: str) -> nn.ModuleDict:
        if name not in self.layers:
            raise ValueError(
                f"flow adapter: expected a layer among {list(self.layers)}, got '{name}'. "
                "The adapter was made for another U-Net."
            )
        return cast(nn.ModuleDict, self.layers[name])

    def _of_level(self, features: Tensor, size: Size, pixels: int) -> Tensor:
        """The features (B, pixels, width) of the level that has so many pixels."""
        sizes = level_sizes(size, self.config.levels)
        counts = [height * width for height, width in sizes]
        if features.shape[1] != sum(counts):
            raise ValueError(
                f"flow adapter: expected {sum(counts)} features for latents of {size[0]}x{size[1]} "
                f"(height x width), got {features.shape[1]}, those of latents of another size."
            )
        if pixels not in counts:
            shapes = ", ".join(f"{height}x{width}" for height, width in sizes)
            raise ValueError(
                f"flow adapter: expected a layer of {shapes} pixels, as a U-Net on latents of "
                f"{size[0]}x{size[1]} has them, got one of {pixels}. Leave out what changes the "
                "size inside the U-Net, such as Deep Shrink, or use an adapter of channel fusion."
            )
        place = counts.index(pixels)
        return features.split(counts, dim=1)[place]


def _known(size: Size | None) -> Size:
    if size is None:
        raise ValueError(
            "flow adapter: expected the latents' height and width, which spatial features need, "
            "got none."
        )
    return size


def fuse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flow_k: Tensor,
    flow_v: Tensor,
    fusion: str | None,
    attention_fn: AttentionFunction,
    own_attention_fn: AttentionFunction | None = None,
) -> Tensor:
    """Cross-attention with the flow's keys and values.

    Args:
        q: queries (B, pixels, inner).
        k, v: the prompt's keys and values (B, length, inner).
        flow_k, flow_v: the flow's, (B, tokens, inner).
        fusion: `"channel"` is the paper's: keys and values of prompt and flow are summed
            token by token, with the flow tokens repeated along a longer prompt.
            `"token"`: the flow tokens have a softmax of their own, and the two results are
            summed, so that zero values leave the result as it was.
        attention_fn: `(q, k, v) -> out`, heads included, all of shape (B, *, inner).
        own_attention_fn: the same for the softmax that "token" gives the flow.

    Returns:
        (B, pixels, inner), ahead of the output projection.

    Raises:
        ValueError: if the fusion is unknown or the prompt is shorter than the flow tokens.
    """
    if fusion == "channel":
        length, tokens = k.shape[1], flow_k.shape[1]
        if length < tokens:
            raise ValueError(
                f"channel fusion: expected a prompt of at least {tokens} tokens, got {length}. "
                "Pad the prompt as CLIP does."
            )
        if length > tokens:
            repeats = math.ceil(length / tokens)
            flow_k = flow_k.repeat(1, repeats, 1)[:, :length]
            flow_v = flow_v.repeat(1, repeats, 1)[:, :length]
        return attention_fn(q, k + flow_k, v + flow_v)
    if fusion == "token":
        return attention_fn(q, k, v) + (own_attention_fn or attention_fn)(q, flow_k, flow_v)
    raise ValueError(f"fusion of keys and values: expected one of {FUSIONS[:2]}, got {fusion!r}.")
