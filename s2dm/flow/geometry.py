"""Sampling and resampling of displacement fields: the arithmetic under FlowField."""

from __future__ import annotations

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
        raise ValueError(f"expected a size of at least 1x1, got {height}x{width}.")
    smaller = (min(height, maps.shape[2]), min(width, maps.shape[3]))
    if smaller != tuple(maps.shape[2:]):
        maps = F.interpolate(maps, size=smaller, mode="area")
    if smaller != (height, width):
        maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return maps
