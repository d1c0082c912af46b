"""Two motions as one: over one another, after one another, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from .field import FlowError, FlowField
from .geometry import resample
from .inverse import chain


def combine_over(objects: FlowField, camera: FlowField) -> FlowField:
    """What moves, seen by a camera that moves on top of it.

    Both of one size and number of frames. `camera` says where each pixel of the view lies in the
    picture of the same frame, `objects` where that was in frame 1.
    """
    _check_same(objects, camera, frames=True)
    parts = [
        chain(seen, outside, moved, hidden)
        for seen, outside, moved, hidden in zip(
            camera.displacement,
            camera.occlusion,
            objects.displacement,
            objects.occlusion,
            strict=True,
        )
    ]
    return FlowField(torch.stack([part[0] for part in parts]), torch.stack([p[1] for p in parts]))


def combine_after(first: FlowField, second: FlowField) -> FlowField:
    """One motion and then another, which begins with the last frame of the first.

    Both of one size. The frames are those of both, the one in common once.
    """
    _check_same(first, second)
    back, hidden = first.displacement[-1], first.occlusion[-1]
    later = [
        chain(moved, unseen, back, hidden)
        for moved, unseen in zip(second.displacement[1:], second.occlusion[1:], strict=True)
    ]
    return FlowField(
        torch.cat([first.displacement, *(part[0][None] for part in later)]),
        torch.cat([first.occlusion, *(part[1][None] for part in later)]),
    )


def combine_in(inside: FlowField, outside: FlowField, mask: Tensor) -> FlowField:
    """One motion where a mask is above one half, another elsewhere.

    Both of one size and number of frames. mask: (1 or N,1,h,w) in [0,1], resized to the flow; it
    lies over the pixels of each frame.
    """
    _check_same(inside, outside, frames=True)
    chosen = fit_mask(mask, inside) > 0.5
    return FlowField(
        torch.where(chosen, inside.displacement, outside.displacement),
        torch.where(chosen, inside.occlusion, outside.occlusion),
    )


def fit_mask(mask: Tensor, flow: FlowField) -> Tensor:
    """A mask (1 or N,1,h,w) at the size of a flow, (1 or N,1,H,W).

    Raises FlowError for another number of masks.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, len(flow)):
        raise FlowError(
            f"mask: expected (1 or {len(flow)},1,h,w), one for all frames or one for each, got "
            f"{tuple(mask.shape)}."
        )
    return resample(mask.float().cpu(), flow.height, flow.width)


def _check_same(first: FlowField, second: FlowField, frames: bool = False) -> None:
    sizes = [(flow.width, flow.height) for flow in (first, second)]
    if sizes[0] != sizes[1]:
        raise FlowError(
            "expected two flows of one size, got {}x{} and {}x{}. Resize one of them with Edit "
            "Flow.".format(*sizes[0], *sizes[1])
        )
    if frames and len(first) != len(second):
        raise FlowError(
            f"expected two flows with the same number of frames, got {len(first)} and "
            f"{len(second)}. Retime one of them with Edit Flow."
        )
