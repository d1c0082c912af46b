"""Changes to a flow as a whole: order of frames, smoothness, mirror images, masks."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from .combine import fit_mask
from .field import FlowError, FlowField

_LONGEST = 100_000  # frames


def loop(flow: FlowField, times: int) -> FlowField:
    """The clip, several times over: after the last frame comes the first."""
    return _repeated(flow, list(range(len(flow))), times)


def ping_pong(flow: FlowField, times: int = 1) -> FlowField:
    """There and back, several times over: the last of its frames is followed by the first."""
    return _repeated(flow, [*range(len(flow)), *range(len(flow) - 2, 0, -1)], times)


def _repeated(flow: FlowField, order: list[int], times: int) -> FlowField:
    if not 1 <= times or times * len(order) > _LONGEST:
        raise FlowError(
            f"expected 1 or more times, and at most {_LONGEST} frames, got {times} times "
            f"{len(order)} frames."
        )
    return flow.select(order * times)


def flip(flow: FlowField, axis: str) -> FlowField:
    """The mirror image, "horizontal" (left and right change places) or "vertical"."""
    if axis not in ("horizontal", "vertical"):
        raise FlowError(f"axis: expected horizontal or vertical, got {axis!r}.")
    across = axis == "horizontal"
    sign = flow.displacement.new_tensor([-1.0, 1.0] if across else [1.0, -1.0]).view(1, 2, 1, 1)
    dimension = 3 if across else 2
    return FlowField(flow.displacement.flip(dimension) * sign, flow.occlusion.flip(dimension))


def smooth_in_space(flow: FlowField, sigma: float) -> FlowField:
    """Displacement blurred with a Gaussian of `sigma` pixels; occlusion stays.

    Pixels that frame 1 doesn't show hardly count: what they move by is a guess.
    """
    if sigma <= 0:
        return flow
    sigma = min(sigma, max(flow.height, flow.width))
    rows, columns = (_gaussian(sigma, side) for side in (flow.height, flow.width))
    displacement = torch.empty_like(flow.displacement)
    for index in range(len(flow)):
        weight = 1 - 0.999 * flow.occlusion[index]
        sums = torch.cat([flow.displacement[index] * weight, weight])
        sums = rows @ sums @ columns.T
        displacement[index] = sums[:2] / sums[2:]
    return FlowField(displacement, flow.occlusion)


def smooth_in_time(flow: FlowField, sigma: float) -> FlowField:
    """Displacement blurred over time with a Gaussian of `sigma` frames; occlusion stays.

    Frame 1 stays at zero: before it the motion goes on backwards, as if mirrored about it, and so
    after the last frame.
    """
    count = len(flow)
    if sigma <= 0 or count < 3:
        return flow
    reach = min(ceil(3 * sigma), count - 1)
    moved = flow.displacement
    before, after = -moved[1 : reach + 1].flip(0), 2 * moved[-1:] - moved[-reach - 1 : -1].flip(0)
    longer = torch.cat([before, moved, after])
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    displacement = torch.zeros_like(moved)
    for number, weight in enumerate(weights.tolist()):
        displacement.add_(longer[number : number + count], alpha=weight)
    displacement[0] = 0
    return FlowField(displacement, flow.occlusion)


def keep_in(flow: FlowField, mask: Tensor, feather: float = 0.0) -> FlowField:
    """Motion within a mask only; outside nothing moves.

    mask: (1 or N,1,h,w) in [0,1], resized to the flow. feather: pixels over which the motion fades
    out across the mask's edge.
    """
    share = fit_mask(mask, flow)
    if feather > 0:
        # A Gaussian that goes from nearly 0 to nearly 1 over that many pixels.
        sigma = min(feather / 4, float(max(flow.height, flow.width)))
        rows, columns = (_gaussian(sigma, side) for side in (flow.height, flow.width))
        share = rows @ share @ columns.T
    share = share.clamp(0, 1)
    return FlowField(flow.displacement * share, flow.occlusion * share)


def _gaussian(sigma: float, side: int) -> Tensor:
    """(side,side): rows of weights that sum to 1, the border left out rather than repeated."""
    place = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((place[:, None] - place[None, :]) / sigma) ** 2)
    return F.normalize(weights, p=1.0, dim=1)
