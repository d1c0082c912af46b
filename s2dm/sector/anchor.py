"""Anchored rays: every frame is held near where the flow takes frame 1 while noise is high."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import FlowField
from ..flow.warp import visibility, warp_picture

ANCHOR_END = 1.0
"""How far into the noise schedule an anchor acts where nothing else is recommended."""
_RELEASE = 0.05  # the last part of the anchor's own time, over which it lets go
_STILL, _MOVING = 0.25, 1.0  # pixels: what moves less is still, what moves more is not


@dataclass(frozen=True, eq=False)
class Anchor:
    """Frame 1 at every frame of a clip, as far as frame 1 shows it.

    While the noise is above a level, the guess of the clean sample is drawn towards it:
    x̂_0^i ← x̂_0^i + w(t) m^i (z^i − x̂_0^i). Below it the frames are free, so that the model repairs
    what warping broke; what stands still, a cell and more away from all that moves, is not broken,
    and stays anchored to the end. Frame 1 itself is such a frame.

    latents: z, (N, C, h, w): frame 1 warped in pixels by the flow, its holes filled, and encoded.
    shown: m, (N, 1, h, w) in [0, 1]: the share of a latent's cell that frame 1 shows.
    still: (N, 1, h, w) in [0, 1]: how far a cell and those around it stay where they were.
    strength: 0 to 1, the largest weight.
    """

    latents: Tensor
    shown: Tensor
    still: Tensor
    strength: float = 1.0

    @classmethod
    def of(
        cls,
        picture: Tensor,
        flow: FlowField,
        encode: Callable[[Tensor], Tensor],
        strength: float = 1.0,
        chunk_size: int = 8,
    ) -> Anchor:
        """Warp, fill and encode a picture, a few frames at a time.

        Args:
            picture: frame 1, (1, 3, H, W) in [0, 1], of the flow's size.
            flow: of the clip.
            encode: frames (n, 3, H, W) in [0, 1] to latents (n, C, h, w) as the sampler has them.
            strength: see above.
            chunk_size: n, at most.
        """
        pixels = visibility(flow)
        starts = range(0, len(flow), chunk_size)
        parts = [
            encode(warp_picture(picture, flow, slice(start, start + chunk_size), pixels))
            for start in starts
        ]
        latents = torch.cat(parts)
        size = (latents.shape[-2], latents.shape[-1])
        moved = F.adaptive_max_pool2d(flow.magnitude(), size)
        moved = F.max_pool2d(moved, 3, stride=1, padding=1)
        still = ((_MOVING - moved) / (_MOVING - _STILL)).clamp(0, 1)
        shown = F.adaptive_avg_pool2d(pixels, size)
        return cls(latents, shown.to(latents), still.to(latents), strength)

    def of_frame(self, index: int) -> Anchor:
        """The anchor of one frame, counted from 0."""
        part = slice(index, index + 1)
        return Anchor(self.latents[part], self.shown[part], self.still[part], self.strength)

    def pull(self, x0: Tensor, weight: float) -> Tensor:
        """Draw the guess of the clean sample towards the anchor.

        Args:
            x0: x̂_0 after guidance, (N, C, h, w).
            weight: w(t) from `release`, 0 to 1.
        """
        share = self.strength * self.shown * self.still.clamp(min=weight)
        return torch.lerp(x0, self.latents.to(x0), share.to(x0))


def release_levels(end: float, sigma: Callable[[float], float]) -> tuple[float, float]:
    """The noise levels between which an anchor lets go that acts until `end` of the schedule.

    Args:
        end: part of the schedule, above 0 to 1.
        sigma: gives σ after a part of it.
    """
    return sigma(end * (1 - _RELEASE)), sigma(end)


def release(sigma: float, begin: float, end: float) -> float:
    """w(t): 1 while the noise σ is above `begin`, 0 below `end`, linear in σ between them."""
    if sigma >= begin:
        return 1.0
    return (sigma - end) / (begin - end) if sigma > end else 0.0
