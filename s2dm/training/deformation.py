"""Random smooth deformations of pictures, of which positions and slopes are known everywhere.

For the equivariance of the region-motion model: regions found in a deformed picture must be the
deformed regions. An affine map near the identity, and bumps of a thin-plate spline on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.region_motion import grid

_CONTROL = 5  # control points along a side
_TINY = 1e-6  # keeps the logarithm finite at a control point


@dataclass(frozen=True)
class Deformation:
    """A deformation for each of B pictures: position z there came from `at(z)`.

    affine: (B, 2, 3). bend: (B, 2, 25), how strongly each control point pulls in x and in y.
    """

    affine: Tensor
    bend: Tensor

    @classmethod
    def draw(
        cls, count: int, affine: float, bend: float, generator: torch.Generator
    ) -> Deformation:
        """Random ones; `affine` and `bend` are standard deviations from the identity."""
        map = torch.eye(2, 3) + affine * torch.randn(count, 2, 3, generator=generator)
        return cls(map, bend * torch.randn(count, 2, _CONTROL**2, generator=generator))

    def at(self, positions: Tensor) -> Tensor:
        """Where positions (B, P, 2) came from, (B, P, 2)."""
        square, _ = self._offsets(positions)
        bumps = square * torch.log(square + _TINY)
        flat = positions @ self.affine[:, :, :2].mT + self.affine[:, None, :, 2]
        return flat + bumps @ self.bend.mT

    def slopes(self, positions: Tensor) -> Tensor:
        """Derivatives of `at` at positions (B, P, 2): (B, P, 2, 2), the last by x and y."""
        square, offsets = self._offsets(positions)
        rise = 2 * (torch.log(square + _TINY) + square / (square + _TINY))
        bumps = torch.einsum("bik,bpk,bpkj->bpij", self.bend, rise, offsets)
        return self.affine[:, None, :, :2] + bumps

    def apply(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) deformed; what comes from outside is mirrored."""
        height, width = pictures.shape[2:]
        cells = grid((height, width), self.affine).flatten(1).T.expand(len(pictures), -1, -1)
        source = self.at(cells).unflatten(1, (height, width)).to(pictures)
        return F.grid_sample(pictures, source, padding_mode="reflection", align_corners=False)

    def _offsets(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances (B, P, 25) from the control points, and (B, P, 25, 2)."""
        control = grid((_CONTROL, _CONTROL), positions).flatten(1).T
        offsets = positions[:, :, None] - control
        return offsets.square().sum(dim=-1), offsets
