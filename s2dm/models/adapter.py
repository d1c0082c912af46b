"""The flow adapter: optical flow as a condition of a Stable Diffusion U-Net.

The paper (arXiv 2403.13408, section 3.3) joins the flow with the prompt's embedding along
the channels, ahead of cross-attention. Concatenation along channels is a sum after the
projection, `[tau; f] W = tau W_tau + f W_f`, so the U-Net keeps its own weights `W_tau`
and the adapter holds the flow encoder and `W_f` for K and V of each cross-attention layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..flow import FlowField
from .config import FUSIONS, FlowAdapterConfig

_ENCODED_AT_ONCE = 16  # frames

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class FlowAdapter(nn.Module):
    """Flow encoder, learned null tokens, and a K and V projection for each layer.

    The projections are zero at the start: an untrained adapter changes nothing.

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
        self.encoder = FlowEncoder(config, operations, device, dtype)
        self.null = nn.Parameter(torch.empty(1, config.tokens, width, **placed))
        nn.init.uniform_(self.null, -1.7, 1.7)  # as large as normalised tokens
        self.layers = nn.ModuleDict()
        for name, inner in config.layers:
            layer = {
                side: operations.Linear(width, inner, bias=False, **placed)
                for side in ("to_k", "to_v")
            }
            for projection in layer.values():
                nn.init.zeros_(projection.weight)
            self.layers[name] = nn.ModuleDict(layer)

    def encode(self, condition: Tensor) -> Tensor:
        """Turn flow conditions into tokens.

        Args:
            condition: (N, 3, h, w) of any size, as `FlowField.condition` makes it:
                displacement in half-frames and occlusion in [0, 1]. The result has its dtype,
                which has to be that of the weights unless the operations cast them.

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
        return self.encoder(condition)

    def tokens(self, field: FlowField, like: Tensor | None = None) -> Tensor:
        """Encode a flow field to (N, tokens, width).

        At the size that the encoder works in, as in training: another way of getting there gives
        edges that the encoder has never seen.

        Args:
            field: of N frames and any size.
            like: the tokens get its type and device; those of the weights if None.
        """
        condition = field.condition(*self.encoder.size).to(self.null if like is None else like)
        return torch.cat([self.encode(part) for part in condition.split(_ENCODED_AT_ONCE)])

    def null_tokens(self, n: int) -> Tensor:
        """Return the learned null label, (n, tokens, width): no statement about motion.

        It is not the code of zero flow, which says that nothing moves.
        """
        return self.null.expand(n, -1, -1)

    def keys_values(self, layer_name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (N, tokens, width) to K and V of one layer, (N, tokens, inner) each.

        Raises:
            ValueError: if the adapter has no such layer.
        """
        if layer_name not in self.layers:
            raise ValueError(
                f"flow adapter: expected a layer among {list(self.layers)}, got '{layer_name}'. "
                "The adapter was made for another U-Net."
            )
        layer = cast(nn.ModuleDict, self.layers[layer_name])
        return layer["to_k"](tokens), layer["to_v"](tokens)


class FlowEncoder(nn.Module):
    """Flow condition (N, 3, h, w) to tokens (N, rows * columns, width), one for each cell.

    Three convolutions of stride 2 shrink the resized condition to the grid. The displacement
    goes in together with sines and cosines of it (as many octaves as `frequencies`),
    because motions of a few pixels are tiny numbers in half-frames, and because the
    normalisations that follow would otherwise hide how fast a motion is.
    """

    def __init__(
        self,
        config: FlowAdapterConfig,
        operations: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.size = (config.grid[0] * 8, config.grid[1] * 8)
        self.frequencies = config.frequencies
        channels = (3 + 4 * config.frequencies, config.hidden, 2 * config.hidden, config.width)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            blocks += [
                operations.Conv2d(before, after, 3, stride=2, padding=1, **placed),
                operations.GroupNorm(32, after, **placed),
                nn.SiLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
        width = config.width
        self.position = nn.Parameter(torch.empty(1, config.tokens, width, **placed))
        nn.init.uniform_(self.position, -0.9, 0.9)
        self.mlp = nn.Sequential(
            operations.LayerNorm(width, **placed),
            operations.Linear(width, 2 * width, **placed),
            nn.SiLU(),
            operations.Linear(2 * width, width, **placed),
        )
        self.norm = operations.LayerNorm(width, **placed)

    def forward(self, condition: Tensor) -> Tensor:
        # The resize and the octaves lose small motions in half precision.
        lifted = _octaves(_resize(condition.float(), self.size), self.frequencies)
        tokens = self.blocks(lifted.to(condition.dtype)).flatten(2).transpose(1, 2)
        tokens = tokens + self.position.to(tokens)
        return self.norm(tokens + self.mlp(tokens))


def fuse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flow_k: Tensor,
    flow_v: Tensor,
    fusion: str,
    attention_fn: AttentionFunction,
) -> Tensor:
    """Cross-attention with flow, for any engine's attention function.

    Args:
        q: queries (B, pixels, inner).
        k, v: the prompt's keys and values (B, length, inner).
        flow_k, flow_v: the flow's, (B, tokens, inner).
        fusion: `"channel"` is the paper's: keys and values of prompt and flow are summed
            token by token, with the flow tokens repeated along a longer prompt.
            `"token"`: the flow tokens have a softmax of their own, and the two results are
            summed, so that zero values leave the result as it was.
        attention_fn: `(q, k, v) -> out`, heads included, all of shape (B, *, inner).

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
        return attention_fn(q, k, v) + attention_fn(q, flow_k, flow_v)
    raise ValueError(f"fusion: expected one of {FUSIONS}, got {fusion!r}.")


def _octaves(condition: Tensor, count: int) -> Tensor:
    """Append sin and cos of 2^j * pi * displacement: (N, 3, h, w) -> (N, 3 + 4 count, h, w)."""
    displacement = condition[:, :2]
    parts = [condition]
    for octave in range(count):
        angle = displacement * (math.pi * 2**octave)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w), linear when it grows and anti-aliased when it shrinks.

    Two matrix products, because not every device has an anti-aliased `interpolate`.
    """
    if tuple(image.shape[2:]) == tuple(size):
        return image  # in training, where autocast would round the products
    rows = _resize_matrix(image.shape[2], size[0], image)
    columns = _resize_matrix(image.shape[3], size[1], image)
    return rows @ image @ columns.T


def _resize_matrix(before: int, after: int, like: Tensor) -> Tensor:
    """(after, before) weights of a triangle filter, as wide as the coarser of both grids."""
    scale = before / after
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * scale - 0.5
    # Clamped centres repeat the border; without it growing would fade there.
    centres = centres.clamp(0, before - 1)
    distance = (torch.arange(before, dtype=torch.float64)[None] - centres[:, None]).abs()
    weights = (1 - distance / max(scale, 1.0)).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(like)
