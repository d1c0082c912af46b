"""What turns flow into tokens: one for each cell of a coarse grid, or of the latents.

Both see a flow condition, displacement in half-frames and occlusion, together with sines and
cosines of the displacement: motions of a few pixels are tiny numbers in half-frames, and the
normalisations that follow would otherwise hide how fast a motion is.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from .config.adapter import FlowAdapterConfig
from .config.networks import LATENT_CELL

Size = tuple[int, int]

_AS_IT_IS = contextlib.nullcontext()


class FlowEncoder(nn.Module):
    """Flow condition (N, 3, h, w) to tokens (N, rows * columns, width), one for each cell.

    Three convolutions of stride 2 shrink the resized condition to the grid.
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
        self.size = (config.grid[0] * LATENT_CELL, config.grid[1] * LATENT_CELL)
        self.frequencies = config.frequencies
        channels = (_lifted(config.frequencies), config.hidden, 2 * config.hidden, config.width)
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
        self.mlp = _mlp(width, operations, placed)
        self.norm = operations.LayerNorm(width, **placed)

    def forward(self, condition: Tensor) -> Tensor:
        # The resize and the octaves lose small motions in half precision.
        lifted = _octaves(_resize(condition.float(), self.size), self.frequencies)
        tokens = self.blocks(lifted.to(condition.dtype)).flatten(2).transpose(1, 2)
        tokens = tokens + self.position.to(tokens)
        return self.norm(tokens + self.mlp(tokens))


class FlowPyramid(nn.Module):
    """Flow condition (N, 3, 8 h, 8 w) to features of latents (h, w), a level after the other.

    Three convolutions of stride 2 make one feature of each cell of the latents: their windows of
    four pixels lie evenly around the cell. Further ones halve the size as the U-Net does, odd sizes
    rounded up, and a level is normalised pixel by pixel: what a place gets depends on the flow
    about it alone, not on how much moves elsewhere.
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
        self.frequencies, self.levels, width = config.frequencies, config.levels, config.width
        channels = (_lifted(config.frequencies), config.hidden, 2 * config.hidden, width)
        self.cells = nn.Sequential(
            *(
                _Halving(before, after, 4, operations, placed)
                for before, after in itertools.pairwise(channels)
            )
        )
        self.halvings = nn.ModuleList(
            _Halving(width, width, 3, operations, placed) for _ in range(max(config.levels))
        )
        self.mlps = nn.ModuleList(_mlp(width, operations, placed) for _ in config.levels)
        self.norms = nn.ModuleList(operations.LayerNorm(width, **placed) for _ in config.levels)
        self.null = nn.Parameter(torch.empty(len(config.levels), width, **placed))
        nn.init.uniform_(self.null, -1.7, 1.7)  # as large as normalised features

    def forward(self, condition: Tensor) -> Tensor:
        lifted = _octaves(condition.float(), self.frequencies)
        features, parts = self.cells(lifted.to(condition.dtype)), []
        for level in range(max(self.levels) + 1):
            if level > 0:
                features = self.halvings[level - 1](features)
            if level in self.levels:
                place = self.levels.index(level)
                rows = features.flatten(2).transpose(1, 2)
                parts.append(self.norms[place](rows + self.mlps[place](rows)))
        return torch.cat(parts, dim=1)

    def nulls(self, size: Size) -> Tensor:
        """The learned null label at latents of a size, (1, features, width)."""
        counts = [height * width for height, width in level_sizes(size, self.levels)]
        rows = (null.expand(n, -1) for null, n in zip(self.null, counts, strict=True))
        return torch.cat(list(rows))[None]


def level_sizes(size: Size, levels: tuple[int, ...]) -> list[Size]:
    """Height and width of each level of a U-Net over latents of a size: odd sizes round up."""
    height, width = size
    return [(-(-height // 2**level), -(-width // 2**level)) for level in levels]


class _Halving(nn.Module):
    """A convolution of stride 2, each pixel normalised over its channels, and SiLU."""

    def __init__(
        self, before: int, after: int, window: int, operations: Any, placed: dict[str, Any]
    ) -> None:
        super().__init__()
        self.conv = operations.Conv2d(before, after, window, stride=2, padding=1, **placed)
        self.norm = operations.LayerNorm(after, **placed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).movedim(1, -1)).movedim(-1, 1)
        return nn.functional.silu(x)


def _mlp(width: int, operations: Any, placed: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(
        operations.LayerNorm(width, **placed),
        operations.Linear(width, 2 * width, **placed),
        nn.SiLU(),
        operations.Linear(2 * width, width, **placed),
    )


def _lifted(frequencies: int) -> int:
    """Channels of a condition with its octaves."""
    return 3 + 4 * frequencies


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
        return image
    rows = _resize_matrix(image.shape[2], size[0], image)
    columns = _resize_matrix(image.shape[3], size[1], image)
    kind = image.device.type
    # In training autocast would round the products; not all devices have it.
    exact = torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else _AS_IT_IS
    with exact:
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
