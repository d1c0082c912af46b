"""Flow the other way: from frame 1 forward to a frame, and clips measured from another frame."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .field import FlowError, FlowField
from .geometry import jacobian, pixel_grid, sample_at, sample_sharp, torn

_FOUND = 0.5  # pixels by which a place may be missed and still be the one that was looked for
_CLOSE = 1e-5  # pixels: a place is known well enough
_FLAT = 0.05  # of an area: where a picture is pressed further, no step can be computed
_JUMP = 4.0  # pixels: neighbours that differ by more belong to two motions, however they turn


class Forward:
    """Where the points of frame 1 are in another frame.

    displacement: (2,H,W), occlusion: (1,H,W), of that frame. What frame 1 doesn't show is a layer
    of its own: a point that it shows is looked for among the visible pixels only, and a hidden one
    among the hidden ones. So background that both frames see behind a moving body keeps its own
    motion.
    """

    def __init__(self, displacement: Tensor, occlusion: Tensor) -> None:
        self._shown, self._hidden = (
            _Layer(displacement, weight) for weight in (1 - occlusion, occlusion)
        )

    def find(self, points: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places (2,h,w) in the frame of points (2,h,w) of frame 1, and which are true, (h,w) bool.

        hidden: (1,h,w) bool, which of the points to look for in the hidden layer; None: none.
        Where the frame doesn't show a point, its place is guessed from its surroundings.
        """
        if hidden is None:
            return self._shown.find(points)
        place, found = points.clone(), torch.zeros_like(hidden[0])
        for layer, which in ((self._shown, ~hidden[0]), (self._hidden, hidden[0])):
            some, true = layer.find(points[:, None, which])
            place[:, which], found[which] = some[:, 0], true[0]
        return place, found


class _Layer:
    """The pixels of a frame that count, and their displacement back and forward.

    displacement: (2,H,W). weight: (1,H,W), how much each pixel counts.
    """

    def __init__(self, displacement: Tensor, weight: Tensor) -> None:
        self._known = weight[0] >= 0.5
        self._back = _continued(displacement, self._known)
        self._forward, self._margin = _splat(displacement, weight)

    def find(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """As `Forward.find`, among these pixels alone."""
        start = points + sample_at(self._forward, points + self._margin)
        target = points.flatten(1)[:, None]
        place = start.flatten(1)[:, None].clone()
        error = self._came(place) - target
        left = torch.arange(target.shape[2], device=target.device)
        # Newton's steps, plain ones beside a jump, where those are led astray, and shorter ones
        # where they overshoot. What they make worse is dropped.
        for step, newton in ((1, True), (1, False), (0.5, True), (0.5, False), (0.25, False)) * 2:
            before, missed = place[..., left], error[..., left]
            way = _solved(jacobian(self._back, before + 1), missed) if newton else missed
            trial = before - step * way
            trial_error = self._came(trial) - target[..., left]
            better = trial_error.norm(dim=0) < missed.norm(dim=0)
            place[..., left] = torch.where(better, trial, before)
            error[..., left] = torch.where(better, trial_error, missed)
            left = left[error[:, 0, left].norm(dim=0) > _CLOSE]
            if not len(left):
                break

        place, error = place.view(points.shape), error.view(points.shape)
        height, width = self._known.shape
        inside = (place > -0.5).all(dim=0)
        inside &= (place[0] < width - 0.5) & (place[1] < height - 0.5)
        column, row = place.round().long().unbind()
        known = self._known[row.clamp(0, height - 1), column.clamp(0, width - 1)]
        found = (error.norm(dim=0) < _FOUND) & inside & known & ~torn(self._back, place + 1)
        return torch.where(found, place, start), found

    def _came(self, place: Tensor) -> Tensor:
        """Where in frame 1 the places (2,h,w) were, (2,h,w)."""
        return place + sample_at(self._back, place + 1)


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


def key_frame(flow: FlowField) -> int:
    """The frame of which flow says most, counted from 0: the one whose visible pixels move most."""
    moved = (flow.magnitude() * (1 - flow.occlusion)).flatten(1).mean(dim=1)
    return int(moved.argmax())


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


def _solved(matrix: Tensor, vector: Tensor) -> Tensor:
    """The solution (2,h,w) of `matrix` (4,h,w) times it being `vector`; of a flat one, `vector`."""
    a, b, c, d = matrix
    area = a * d - b * c
    solution = torch.stack([d * vector[0] - b * vector[1], a * vector[1] - c * vector[0]])
    return torch.where(area.abs() > _FLAT, solution / area, vector)


def _continued(displacement: Tensor, known: Tensor) -> Tensor:
    """(2,H+2,W+2): the displacement (2,H,W) goes on straight for a pixel beyond what is known.

    known: (H,W) bool. A place at the edge lies between a pixel on this side and one beyond it. Of
    what is known in none of eight directions, values are as they are, at the border repeated.
    """
    height, width = known.shape
    field = F.pad(displacement[None], (3, 3, 3, 3), mode="replicate")[0]
    inner = F.pad(known, (3, 3, 3, 3))

    def shifted(values: Tensor, down: int, right: int) -> Tensor:
        rows, columns = slice(2 + down, 4 + down + height), slice(2 + right, 4 + right + width)
        return values[..., rows, columns]

    total, count = (
        torch.zeros_like(shifted(field, 0, 0)),
        torch.zeros_like(shifted(field, 0, 0)[:1]),
    )
    for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
        near, further = (shifted(field, step * down, step * right) for step in (1, 2))
        both = shifted(inner, down, right) & shifted(inner, 2 * down, 2 * right)
        both &= (near - further).norm(dim=0) < _JUMP
        total += (2 * near - further) * both
        count += both
    beyond = ~shifted(inner, 0, 0) & (count > 0)
    return torch.where(beyond, total / count.clamp(min=1), shifted(field, 0, 0))


def _splat(displacement: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """The inverse of a displacement field p -> p + d(p), by bilinear forward splatting of -d.

    displacement: (2,H,W) pixels. weight: (1,H,W), how much each pixel counts. Returns it on a
    canvas that is larger on each side by the margin, pixels, which comes with it: what leaves the
    picture is kept there. Holes take the values around them.
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
    return _fill(canvas[:2], canvas[2:]), margin


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
