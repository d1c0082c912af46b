"""Flow the other way: from frame 1 forward to a frame, and clips measured from another frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .field import FlowError, FlowField
from .geometry import pixel_grid, sample_at, sample_sharp, torn

_FOUND = 0.5  # pixels by which a place may be missed and still be the one that was looked for


@dataclass(frozen=True, eq=False)
class _Splatted:
    """Forward displacement on a canvas that is `margin` pixels larger on each side."""

    displacement: Tensor
    margin: int

    def at(self, position: Tensor) -> Tensor:
        """Displacement (2,h,w) at `position` (2,h,w)."""
        return sample_at(self.displacement, position + self.margin)


class Forward:
    """Where the points of frame 1 are in another frame.

    displacement: (2,H,W), occlusion: (1,H,W), of that frame. What frame 1 doesn't show is a layer
    of its own: a point that it shows is looked for among the visible pixels only, and a hidden one
    among the hidden ones. So background that both frames see behind a moving body keeps its own
    motion.
    """

    def __init__(self, displacement: Tensor, occlusion: Tensor) -> None:
        self._back, self._occlusion = displacement, occlusion
        self._layers = [_splat(displacement, weight) for weight in (1 - occlusion, occlusion)]

    def find(self, points: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places (2,h,w) in the frame of points (2,h,w) of frame 1, and which are true, (h,w) bool.

        hidden: (1,h,w) bool, which of the points to look for in the hidden layer; None: none.
        Where the frame doesn't show a point, its place is guessed from its surroundings.
        """
        back = self._back
        if hidden is None:
            hidden = torch.zeros_like(points[:1], dtype=torch.bool)
        seen, unseen = (layer.at(points) for layer in self._layers)
        place = start = points + torch.where(hidden, unseen, seen)
        error = place + sample_at(back, place) - points
        # Shorter steps converge where the motion stretches the picture; worse ones are dropped.
        for step in (1, 0.5, 0.25) * 3:
            trial = place - step * error
            trial_error = trial + sample_at(back, trial) - points
            better = trial_error.norm(dim=0) < error.norm(dim=0)
            place = torch.where(better, trial, place)
            error = torch.where(better, trial_error, error)

        height, width = back.shape[1:]
        inside = (place > -0.5).all(dim=0)
        inside &= (place[0] < width - 0.5) & (place[1] < height - 0.5)
        same_layer = (sample_at(self._occlusion, place) >= 0.5) == hidden
        found = (error.norm(dim=0) < _FOUND) & inside & same_layer[0] & ~torn(back, place)
        return torch.where(found, place, start), found


def rebase(flow: FlowField, indices: Sequence[int]) -> FlowField:
    """The clip made of these frames, in this order, measured from the first of them.

    With another reference r than frame 1, the flow of frame i is composed through frame 1: p is
    carried to p + f^i(p), and then forward to where that is in frame r. What frame r doesn't show
    is occluded and moves as its surroundings.
    """
    order = [range(len(flow))[index] for index in indices]
    if not order:
        raise FlowError("expected at least one frame, got an empty selection.")
    reference = order[0]
    if reference == 0:
        return flow.select(order)
    forward = Forward(flow.displacement[reference], flow.occlusion[reference])
    grid = pixel_grid(flow.height, flow.width, flow.displacement)
    displacement = torch.zeros(len(order), *flow.displacement.shape[1:])
    occlusion = torch.zeros(len(order), *flow.occlusion.shape[1:])
    for number, index in enumerate(order):
        if index != reference:
            hidden = flow.occlusion[index] >= 0.5
            place, found = forward.find(grid + flow.displacement[index], hidden)
            displacement[number], occlusion[number] = place - grid, (~found)[None].float()
    return FlowField(displacement, occlusion)


def reverse(flow: FlowField) -> FlowField:
    """The clip played backwards, measured from its last frame."""
    return rebase(flow, range(len(flow) - 1, -1, -1))


def from_previous(steps: Sequence[tuple[Tensor, Tensor]]) -> FlowField:
    """A field from flow between neighbours: for frames 2 to N, back to the frame before.

    steps: displacement (2,H,W) and occlusion (1,H,W) of each. Displacements are chained to frame
    1; what is hidden or outside on the way is occluded.
    """
    back, hidden = torch.zeros_like(steps[0][0]), torch.zeros_like(steps[0][1])
    displacements, occlusions = [back], [hidden]
    for step, unknown in steps:
        back, hidden = chain(step, unknown, back, hidden)
        displacements.append(back)
        occlusions.append(hidden)
    return FlowField(torch.stack(displacements), torch.stack(occlusions))


def to_previous(steps: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Flow from frames 1 to N - 1 forward to the next, as flow from the next back, each."""
    turned = []
    for displacement, occlusion in steps:
        # For what is given forward, the frame before is the one that is looked for.
        grid = pixel_grid(displacement.shape[1], displacement.shape[2], displacement)
        place, found = Forward(displacement, occlusion).find(grid)
        turned.append((place - grid, (~found)[None].float()))
    return turned


def chain(
    displacement: Tensor, occlusion: Tensor, before: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Flow to a frame, and from that frame on, as one: (2,H,W) and (1,H,W) each.

    A pixel goes to q = p + displacement(p), and on to q + before(q). Occluded is what either
    doesn't show, and what lies outside in between.
    """
    height, width = displacement.shape[1:]
    grid = pixel_grid(height, width, displacement)
    middle = grid + displacement
    further = sample_sharp(before, middle)
    inside = (middle > -0.5).all(dim=0) & (middle[0] < width - 0.5) & (middle[1] < height - 0.5)
    seen = (1 - occlusion) * (1 - sample_at(hidden, middle.round())) * inside
    return displacement + further, 1 - seen


def _splat(displacement: Tensor, weight: Tensor) -> _Splatted:
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
    return _Splatted(_fill(canvas[:2], canvas[2:]), margin)


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
