"""What is measured on one clip: does it follow the flow, stand still elsewhere, wear its colours.

Each metric returns a `Total`, a sum with the weight that it is divided by, so that figures of many
clips are pooled over pixels or garments, not averaged over clips of unequal size.

Frames are (N,3,H,W) in [0,1], and flow is measured from frame 1 in pixels of that size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import FlowField

MOVING = 1.0  # pixels: what moves further belongs to the moving region
STILL = 0.5  # pixels: what moves less in every frame is still


@dataclass(frozen=True)
class Total:
    """A sum and its weight; their quotient is the figure."""

    total: float
    weight: float

    @property
    def figure(self) -> float:
        """NaN where there was nothing to measure (no pixel moved, no garment was in sight)."""
        return self.total / self.weight if self.weight > 0 else float("nan")


def pooled(totals: Iterable[Total]) -> Total:
    """The same metric over several clips."""
    totals = list(totals)
    return Total(sum(t.total for t in totals), sum(t.weight for t in totals))


def pooled_figure(totals: Iterable[Total]) -> float:
    """The figure of the same metric over several clips."""
    return pooled(totals).figure


# ------------------------------------------------------------------------------------- motion


def moving_region(flow: FlowField) -> Tensor:
    """(N,1,H,W) bool: where a flow moves by more than a pixel and frame 1 shows the pixel."""
    return (flow.magnitude() > MOVING) & (flow.occlusion < 0.5)


def still_region(flow: FlowField, margin: int = 8) -> Tensor:
    """(1,1,H,W) bool: what a flow never moves nor hides, `margin` pixels from all it does.

    For clips whose still background nobody knows better. The margin is a latent's side.
    """
    busy = (flow.magnitude() > STILL) | (flow.occlusion > 0.5)
    busy = busy.any(dim=0, keepdim=True).float()
    return F.max_pool2d(busy, 2 * margin + 1, stride=1, padding=margin) == 0


def flow_error(realised: FlowField, given: FlowField) -> Total:
    """End-point error over motion: how much of the given motion a clip did not make.

    The length of the difference between the flow of the clip (`realised`, estimated from its
    frames) and the flow that it was given, summed over the moving region of the given one, over
    the given motion there. 0 is perfect, 1 is what a clip scores that stands still.
    """
    moving = moving_region(given)
    error = (realised.displacement - given.displacement).norm(dim=1, keepdim=True)
    return Total(error[moving].sum().item(), given.magnitude()[moving].sum().item())


def motion_magnitude(flow: FlowField, region: Tensor | None = None) -> Total:
    """Mean length of the displacement in pixels, in a region (N,1,H,W) or all of frames 2 to N."""
    length = flow.magnitude()
    length = length[1:] if region is None else length[region]
    return Total(length.sum().item(), length.numel())


def warp_error(frames: Tensor, flow: FlowField) -> Total:
    """Mean |frame i − frame 1 warped by the flow| where frame 1 shows the pixel, of 255.

    Over frames 2 to N: frame 1 has none.
    """
    difference = (frames - flow.warp(frames[:1])).abs().mean(dim=1, keepdim=True)[1:] * 255
    visible = flow.occlusion[1:] < 0.5
    return Total(difference[visible].sum().item(), visible.sum().item())


def flicker(frames: Tensor, still: Tensor) -> Total:
    """Standard deviation over time of pixels that nothing passes, of 255.

    still: bool, its last two dimensions (H,W).
    """
    deviation = frames.std(dim=0, correction=0).mean(dim=0) * 255
    still = still.reshape(deviation.shape)
    return Total(deviation[still].sum().item(), still.sum().item())


# --------------------------------------------------------------------------------- attributes


class ColouredRegion(Protocol):
    """Pixels (H,W) that should have the colour of one word of a palette (word to RGB)."""

    mask: Tensor
    colour: str
    palette: Mapping[str, tuple[float, float, float]]


def attribute_accuracy(frame: Tensor, regions: Iterable[ColouredRegion]) -> Total:
    """Share of the regions that have the colour that was named.

    Each pixel of a region votes for the palette's nearest word in CIELAB, and most votes win: so
    patterns, shading and a figure that stands a little beside its place count little. Of a first
    frame (3,H,W); regions without a pixel are left out.
    """
    right = seen = 0
    for region in regions:
        if region.mask.any():
            right += nearest_word(frame[:, region.mask].T, region.palette) == region.colour
            seen += 1
    return Total(right, seen)


def nearest_word(pixels: Tensor, palette: Mapping[str, tuple[float, float, float]]) -> str:
    """The word of a palette that most pixels (P,3) in [0,1] are nearest to in CIELAB."""
    words = list(palette)
    colours = srgb_to_lab(torch.tensor([palette[word] for word in words]).to(pixels))
    nearest = torch.cdist(srgb_to_lab(pixels), colours).argmin(dim=1)
    return words[nearest.bincount(minlength=len(words)).argmax()]


def srgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB (…,3) in [0,1] to CIELAB (…,3) under D65, in float64. IEC 61966-2-1 and CIE 15."""
    rgb = rgb.double()
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = linear.new_tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(dim=1)  # white is (1, 1, 1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)
