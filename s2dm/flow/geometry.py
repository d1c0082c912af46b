"""Sampling, resampling and inverting displacement fields: the arithmetic under FlowField."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(2,H,W): the (x, y) coordinates of every pixel, in the dtype and on the device of `like`."""
    y = torch.arange(height, dtype=like.dtype, device=like.device)
    x = torch.arange(width, dtype=like.dtype, device=like.device)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows])


def sample_at(image: Tensor, position: Tensor) -> Tensor:
    """Bilinear samples of `image` at `position`, the border repeated outside.

    image: (N,C,H,W) or (C,H,W). position: (N,2,h,w) or (2,h,w), (x, y) in pixels of the image.
    Returns (N,C,h,w) or (C,h,w).
    """
    if image.ndim == 3:
        return sample_at(image[None], position[None])[0]
    height, width = image.shape[2:]
    # Pixel centres at (x + 1/2): this convention has no division by W - 1, so W = 1 works.
    size = position.new_tensor([width, height]).view(1, 2, 1, 1)
    grid = ((2 * position + 1) / size - 1).permute(0, 2, 3, 1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def resample(maps: Tensor, height: int, width: int) -> Tensor:
    """(N,C,H,W) maps at another size: area averages where it shrinks, bilinear where it grows."""
    if height < 1 or width < 1:
        raise ValueError(f"a size must be at least 1x1, got {height}x{width}")
    smaller = (min(height, maps.shape[2]), min(width, maps.shape[3]))
    if smaller != tuple(maps.shape[2:]):
        maps = F.interpolate(maps, size=smaller, mode="area")
    if smaller != (height, width):
        maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return maps


@dataclass(frozen=True)
class Inverse:
    """A displacement field on a canvas that is `margin` pixels larger on each side."""

    displacement: Tensor
    margin: int

    def at(self, position: Tensor) -> Tensor:
        """Displacement (2,h,w) at `position` (2,h,w)."""
        return sample_at(self.displacement, position + self.margin)


def invert(displacement: Tensor, weight: Tensor) -> Inverse:
    """The inverse of a displacement field p -> p + d(p), by bilinear forward splatting of -d.

    displacement: (2,H,W) pixels. weight: (1,H,W), how much each pixel counts. Points that leave
    the picture are kept on a margin around it. Holes take the values around them.
    """
    _, height, width = displacement.shape
    margin = min(ceil(displacement.abs().max().item()) + 1, max(height, width))
    canvas_height, canvas_width = height + 2 * margin, width + 2 * margin
    target = pixel_grid(height, width, displacement) + displacement + margin
    corner = target.floor()
    fraction = target - corner
    values = torch.cat([-displacement, torch.ones_like(weight)]).flatten(1)

    canvas = displacement.new_zeros(3, canvas_height * canvas_width)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = corner[0].long() + dx, corner[1].long() + dy
            inside = (x >= 0) & (x < canvas_width) & (y >= 0) & (y < canvas_height)
            share = (1 - dx - fraction[0]).abs() * (1 - dy - fraction[1]).abs()
            share = (share * weight[0] * inside).flatten()
            index = (y * canvas_width + x).flatten() * inside.flatten()
            canvas.index_add_(1, index, values * share)
    canvas = canvas.view(3, canvas_height, canvas_width)
    return Inverse(_fill(canvas[:2], canvas[2:]), margin)


def _fill(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, holes filled from coarser and coarser averages (push-pull)."""
    known = weight.clamp(max=1)
    mean = total / weight.clamp(min=1e-6)
    height, width = weight.shape[1:]
    if height == 1 and width == 1:
        return mean * known
    # Halve by summing 2x2 blocks of what is known, solve there, and come back.
    odd = (0, width % 2, 0, height % 2)
    pooled = [F.avg_pool2d(F.pad(part, odd)[None], 2)[0] * 4 for part in (mean * known, known)]
    coarse = _fill(*pooled)
    coarse = F.interpolate(coarse[None], scale_factor=2, mode="bilinear", align_corners=False)
    return mean * known + coarse[0, :, :height, :width] * (1 - known)
