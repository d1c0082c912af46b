"""Paths of single points: out of a flow, and as other tools write them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .draw.state import Array
from .field import FlowError, FlowField
from .inverse import Forward

_MOST = 10_000  # points


def flow_to_tracks(flow: FlowField, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where points of frame 1 are in every frame.

    points: (P,2), x and y in pixels of the flow, within the picture. Returns (N,P,2) float32 and
    (N,P) bool, whether the frame shows the point. Where it doesn't, its path goes straight on
    between the frames that do, and after the last of them it stays.

    What was drawn comes back to 0.05 pixels where it can: hidden points can't, nor tracks that
    contradict their neighbours by more than a quarter of their distance.
    """
    if points.ndim != 2 or points.shape[1] != 2:
        raise FlowError(f"points: expected (P,2), x and y of each, got {tuple(points.shape)}.")
    if not 1 <= len(points) <= _MOST:
        raise FlowError(
            f"points: expected 1 to {_MOST} points, got {len(points)}. Of a grid, change its "
            "spacing."
        )
    points = points.float()
    last = points.new_tensor([flow.width, flow.height])
    outside = ((points < -0.5) | (points > last - 0.5) | ~torch.isfinite(points)).any(dim=1)
    if outside.any():
        number = int(outside.nonzero()[0])
        x, y = points[number].tolist()
        raise FlowError(
            f"points[{number}]: expected a point of the picture, {flow.width} x {flow.height} "
            f"pixels, got ({x:g}, {y:g})."
        )
    row = points.T[:, None]
    paths, seen = points.repeat(len(flow), 1, 1), torch.ones(len(flow), len(points)).bool()
    for index in range(1, len(flow)):
        place, found = Forward(flow.displacement[index], flow.occlusion[index]).find(row)
        paths[index], seen[index] = place[:, 0].T, found[0]
    frames = np.arange(len(flow))
    for number in range(len(points)):
        known = seen[:, number].numpy()
        if not known.all():
            for axis in (0, 1):
                path = paths[:, number, axis].numpy()
                path[:] = np.interp(frames, frames[known], path[known])
    return paths, seen


def grid_points(width: int, height: int, spacing: float) -> Tensor:
    """Points all over a picture, (P,2), `spacing` pixels apart and centred."""
    if not spacing >= 1:
        raise FlowError(f"spacing: expected at least 1 pixel, got {spacing:g}.")
    x, y = (
        (side - 1) / 2 + spacing * (torch.arange(count) - (count - 1) / 2)
        for side, count in ((side, max(int(side // spacing), 1)) for side in (width, height))
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def tracks_to_json(paths: Tensor) -> str:
    """Paths (N,P,2) as the editors for ATI and WanMove write them: a list of points each."""
    rounded = paths.double().mul(1000).round().div(1000).transpose(0, 1).tolist()
    return json.dumps([[{"x": x, "y": y} for x, y in path] for path in rounded])


def tracks_from_paths(paths: Tensor, seen: Tensor | None = None) -> tuple[Array, ...]:
    """Paths as the renderer of drawn motion takes them: (n,3) each, x, y and time in [0,1].

    paths: (N,P,2), a point a frame. seen: (N,P) or (N,1) bool, points that count; None: all.
    """
    if paths.ndim != 3 or paths.shape[2] != 2 or not len(paths):
        raise FlowError(f"tracks: expected paths (frames,points,2), got {tuple(paths.shape)}.")
    if not torch.isfinite(paths).all():
        raise FlowError("tracks: expected finite points, got NaN or infinity.")
    count, number = paths.shape[:2]
    if seen is None:
        seen = torch.ones(count, number).bool()
    if seen.ndim != 2 or len(seen) != count or seen.shape[1] not in (1, number):
        raise FlowError(
            f"tracks: expected visibility ({count},{number}) to match the paths, got "
            f"{tuple(seen.shape)}."
        )
    time = np.linspace(0, 1, count)
    whole = np.concatenate(
        [paths.double().cpu().numpy(), np.broadcast_to(time[:, None, None], (count, number, 1))], 2
    )
    known = seen.bool().cpu().expand(count, number).numpy()
    return _nonempty([whole[known[:, k], k] for k in range(number)])


def _nonempty(tracks: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(track for track in tracks if len(track))
