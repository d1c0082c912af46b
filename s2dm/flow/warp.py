"""A picture moved by a flow: what frame 1 shows of every frame, and what it doesn't."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .field import FlowError, FlowField
from .geometry import pixel_grid, sample_at

_APART = 2.0  # pixels: two displacements that differ by more are those of two things
_FILL_RADIUS = 3  # pixels around a hole that its filling is made of


def visibility(flow: FlowField) -> Tensor:
    """How much of each pixel frame 1 shows, (N,1,H,W) in [0,1].

    It shows none of what is occluded, of what lies outside its edges, and of what stands behind
    something else: where two pixels of a frame claim one place of frame 1, the one that moves
    further against the rest of the picture is in front. Flow that was estimated or generated often
    leaves the other one unmarked, and a ghost would stay there.
    """
    grid = pixel_grid(flow.height, flow.width, flow.displacement)
    last = grid.new_tensor([flow.width - 1, flow.height - 1]).view(2, 1, 1)
    shown = 1 - flow.occlusion
    # Frame by frame, so that a long clip takes no more memory than its result.
    for frame, displacement in zip(shown[1:], flow.displacement[1:], strict=True):
        position = grid + displacement
        frame *= ((position > -0.5) & (position < last + 0.5)).all(dim=0, keepdim=True)
        places = position.round().clamp(min=torch.zeros_like(last), max=last).long()
        frame *= ~_behind(displacement, places, frame > 0.5)
    return shown


def _behind(displacement: Tensor, places: Tensor, shown: Tensor) -> Tensor:
    """(1,H,W) bool: pixels whose place in frame 1 is also claimed by something in front of them.

    Args:
        displacement: (2,H,W) of one frame.
        places: (2,H,W) the pixels (x, y) of frame 1 that they claim.
        shown: (1,H,W) bool, the pixels whose claims count.
    """
    width = displacement.shape[2]
    own = displacement - displacement.flatten(1).median(dim=1).values.view(2, 1, 1)
    far = own.square().sum(0).sqrt().flatten()
    place = (places[1] * width + places[0]).flatten()
    counts = shown.flatten()
    farthest = torch.zeros_like(far).scatter_reduce(0, place[counts], far[counts], "amax")
    return (farthest[place] > far + _APART).view(shown.shape)


def warp_picture(
    picture: Tensor, flow: FlowField, frames: slice = slice(None), shown: Tensor | None = None
) -> Tensor:
    """The picture as frame 1, moved to each of the frames, its holes filled from their rims.

    Args:
        picture: (1,C,H,W) in [0,1], of the flow's size; C is 1 or 3.
        flow: of the clip.
        frames: which of them, so that long clips can come in parts.
        shown: (N,1,H,W) from `visibility`, of the whole clip; None fills nothing.

    Returns:
        (n,C,H,W) float32 in [0,1], on the CPU.

    Raises:
        FlowError: the picture has another size.
    """
    if picture.ndim != 4 or picture.shape[0] != 1 or picture.shape[2:] != (flow.height, flow.width):
        raise FlowError(
            f"picture: expected (1, C, {flow.height}, {flow.width}), the flow's size, got "
            f"{tuple(picture.shape)}. Resize the picture or the flow."
        )
    displacement = flow.displacement[frames].cpu()
    position = pixel_grid(flow.height, flow.width, displacement) + displacement
    moved = sample_at(picture.float().cpu().expand(len(position), -1, -1, -1), position)
    if shown is None:
        return moved
    holes = shown[frames].cpu() < 0.5
    return torch.stack([_filled(*pair) for pair in zip(moved, holes, strict=True)])


def _filled(picture: Tensor, hole: Tensor) -> Tensor:
    """The picture (C,H,W) with what lies in the hole (1,H,W) painted from what lies around it."""
    if not hole.any() or hole.all():
        return picture
    # It takes a third of a second to import, and a warp without holes does without it.
    import cv2

    pixels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    mask = hole[0].to(torch.uint8).numpy()
    filled = cv2.inpaint(np.ascontiguousarray(pixels), mask, _FILL_RADIUS, cv2.INPAINT_TELEA)
    painted = torch.from_numpy(filled).view(*pixels.shape).permute(2, 0, 1).float() / 255
    return torch.where(hole, painted, picture)
