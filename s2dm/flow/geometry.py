"""Sampling and resampling of displacement fields: the arithmetic under FlowField."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SPREAD = 1.0  # square pixels, of two values two pixels apart, half way between them
_EVEN = 2.5  # of a map's matrix, its square by its determinant: one side is twice the other one


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


def sample_sharp(field: Tensor, position: Tensor) -> Tensor:
    """Samples (2,h,w) of a displacement field (2,H,W) at `position` (2,h,w) that keep its edges.

    Bilinear where the field is smooth, nearest where it jumps: nothing moves in between two
    motions.
    """
    rounded = sample_at(field, position.round())
    return torch.where(torn(field, position), rounded, sample_at(field, position))


def torn(field: Tensor, position: Tensor) -> Tensor:
    """Whether a displacement field (2,H,W) jumps at `position` (2,h,w), (h,w) bool.

    It does where the four values around differ by more than two pixels, unless the picture turns
    and grows there: what lies apart is torn in one direction.
    """
    spread = sample_at(field.square(), position) - sample_at(field, position).square()
    a, b, c, d = jacobian(field, position)
    evenly = a * a + b * b + c * c + d * d <= _EVEN * (a * d - b * c)
    return (spread.sum(dim=0) > _SPREAD) & ~evenly


def jacobian(displacement: Tensor, position: Tensor) -> Tensor:
    """Of the map p -> p + displacement(p), within half a pixel of `position` (2,h,w).

    Returns (4,h,w): x by x, x by y, y by x, y by y.
    """
    half = 0.5 * torch.eye(2).to(position)[:, :, None, None]
    right, down = (
        sample_at(displacement, position + step) - sample_at(displacement, position - step)
        for step in half
    )
    return torch.stack([1 + right[0], down[0], right[1], 1 + down[1]])


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
