"""Attention of the flow generator: along time, within a frame, and linear within a frame.

All three read and write clips of shape (B, N, C, h, w) and are residual: normalise over the
channels, attend, add. Only `TemporalAttention` lets a frame see the others. The layers are
those of LFDM (arXiv 2303.13744), which are those of Video Diffusion Models (2204.03458).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROTARY_DIMS = 32  # the first dimensions of a head carry positions, at most this many
_ROTARY_BASE = 10000.0


class ChannelNorm(nn.Module):
    """Normalise the last dimension; a gain but no offset."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, eps=1e-5)


class Attention(nn.Module):
    """Self-attention among the tokens of (*, length, width); see the classes below."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm = ChannelNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=bias)

    def attend(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """(*, length, width) to the same shape, without the residual sum."""
        flat = self.to_qkv(self.norm(tokens)).flatten(0, -3)
        qkv = flat.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (rows, heads, length, head_dim)
        out = self.mix(q, k, v, bias)
        return self.to_out(out.transpose(1, 2).flatten(2)).view_as(tokens)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class SpatialAttention(Attention):
    """Every place of a frame attends to all places of that frame."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(3).transpose(2, 3)  # (B, N, h w, C)
        return x + self.attend(tokens).transpose(2, 3).view(x.shape)


class LinearAttention(SpatialAttention):
    """Spatial attention at a cost linear in the number of places (arXiv 1812.01243).

    The softmax of the keys runs over places and that of the queries over dimensions, so that
    keys and values meet first. No place sees another's query: this is not a kernel of
    scaled-dot-product attention.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__(width, heads, head_dim, bias=True)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        context = k.softmax(dim=-2).transpose(-2, -1) @ v
        return (q.softmax(dim=-1) * q.shape[-1] ** -0.5) @ context


class TemporalAttention(Attention):
    """Every place attends to itself in all frames of the clip.

    Positions enter twice: queries and keys are turned by rotary angles (arXiv 2104.09864),
    and `bias` (heads, N, N) from `RelativePositionBias` is added to the scores.
    """

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        tokens = x.permute(0, 3, 4, 1, 2)  # (B, h, w, N, C)
        return x + self.attend(tokens, bias).permute(0, 3, 4, 1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return super().mix(rotate(q), rotate(k), v, None if bias is None else bias.to(q)[None])


class RelativePositionBias(nn.Embedding):
    """A learned score for each head and each distance in time between two frames.

    T5's buckets (arXiv 1910.10683): half of them for each direction; of these, half hold one
    distance each, and the rest share the larger ones on a logarithmic scale.
    """

    BUCKETS = 32
    MAX_DISTANCE = 32  # this distance and all beyond share the last bucket

    def __init__(self, heads: int) -> None:
        super().__init__(self.BUCKETS, heads)

    def forward(self, num_frames: int) -> Tensor:  # type: ignore[override]
        """Return (heads, N, N) for N frames; rows are queries."""
        position = torch.arange(num_frames, device=self.weight.device)
        bucket = self.bucket(position[None, :] - position[:, None])
        return super().forward(bucket).permute(2, 0, 1)

    @classmethod
    def bucket(cls, offset: Tensor) -> Tensor:
        """Bucket of each offset (whole numbers): the key's frame minus the query's."""
        side = cls.BUCKETS // 2  # the second half is for keys that lie ahead
        exact = side // 2
        distance = offset.abs()
        # Compared rather than computed: a logarithm in float32 may fall short of a whole number,
        # and not every device has float64.
        growth = (cls.MAX_DISTANCE / exact) ** (1 / (side - exact))
        far = exact - 1
        for octave in range(side - exact):
            far = far + (distance >= exact * growth**octave - 1e-6).long()
        return torch.where(distance < exact, distance, far) + (offset > 0) * side


def rotate(x: Tensor) -> Tensor:
    """Turn neighbouring pairs of dimensions of (*, N, head_dim) by angles that grow with time.

    In float32 whatever the type of `x`, because angles of many radians lose their phase in
    half precision.
    """
    dims = min(_ROTARY_DIMS, x.shape[-1])
    steps = torch.arange(0, dims, 2, device=x.device, dtype=torch.float32) / dims
    time = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angle = time[:, None] * _ROTARY_BASE**-steps  # (N, dims / 2)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    first, second = x[..., :dims].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.flatten(-2), x[..., dims:]], dim=-1)
