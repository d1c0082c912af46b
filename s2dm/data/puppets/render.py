"""Rendering a clip with its exact optical flow.

A figure is a stack of flat, rigid pieces. Frame i places each piece by an affine map; composing the
map of frame 1 with the inverse of the map of frame i says where every point seen in frame i was in
frame 1, without estimation.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ...flow import FlowField
from ...flow.pose import JOINTS
from ..clip import Clip, Garment
from .actions import ACTIONS, poses
from .backgrounds import paint_room
from .captions import caption
from .figure import Wardrobe
from .persons import PERSONS, TOP_COLOURS, TROUSER_COLOURS, Person
from .skeleton import Placement, View, body, joints, place, project
from .staging import USUAL, Camera, Staging

_SUB = 3  # samples per pixel and axis
_ZOOM, _FEET = 1.115, 0.94
_NOSE = np.array([0.0, -8.8])  # of the head, in its own coordinates
# The pieces that are cloth all over, or nearly so: sleeves and trouser legs may be short.
_GARMENTS = {"torso": "top", "pelvis": "trousers", "thigh": "trousers"}


def render_clip(
    person: int,
    action: int,
    take: int,
    size: int = 128,
    frames: int = 16,
    amplitude: float = 1.0,
    who: Person | None = None,
    staging: Staging = USUAL,
) -> Clip:
    """Render a person doing an action.

    Args:
        person: index into `PERSONS`.
        action: index into `ACTIONS`.
        take: varies what the caption does not say: room, light, speed and size of the movement.
            The same numbers always give the same clip.
        size: height and width in pixels.
        frames: number of frames, 1 or more.
        amplitude: how much larger than usual the movement is, 0 for none; frame 1 stays the same.
        who: somebody who is not of the cast, in the place of `person`.
        staging: where the person stands, at which size, and how the camera moves.

    Raises:
        ValueError: an index or a number is out of range.
    """
    if not 0 <= person < len(PERSONS) or not 0 <= action < len(ACTIONS):
        raise ValueError(
            f"Expected a person below {len(PERSONS)} and an action below {len(ACTIONS)}, "
            f"got person {person} and action {action}."
        )
    if size < 8 or frames < 1 or take < 0 or amplitude < 0:
        raise ValueError(
            "Expected size >= 8, frames >= 1, take >= 0 and amplitude >= 0, got "
            f"{size}, {frames}, {take} and {amplitude:g}."
        )
    rng = np.random.default_rng((2403, person, action, take))
    who, what = who or PERSONS[person], ACTIONS[action]
    # Usually the camera stands still, as in MHAD, and the person in the middle: frame 1 has no
    # flow that could say where a person stands, and the caption doesn't.
    right, down = (size / 128 * shift for shift in staging.place)
    scale = size / 128 * _ZOOM * staging.size
    view = View(x=(size - 1) / 2 + right, y=size * _FEET + down, scale=scale, turn=what.turn)
    angle = rng.uniform(-1.1, 1.1)
    light = np.array([0.75 * np.sin(angle), -0.55, 0.75])
    moments = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    moments = moments ** rng.uniform(0.85, 1.2) * rng.uniform(0.92, 1.0)
    pose = poses(what, moments, amplitude * rng.uniform(0.88, 1.06))

    measures = body(who)
    camera = staging.camera(size, frames)
    placements = {
        name: camera.film(placement) for name, placement in place(measures, pose, view).items()
    }
    joints_at = {
        name: camera.points(point) for name, point in project(joints(measures, pose), view).items()
    }
    head = placements["head"]
    joints_at["nose"] = head.matrix @ _NOSE + head.origin
    density = max(3.0 * scale, 1.0)
    wardrobe = Wardrobe(who, measures, person, density, light, what.turn)
    pieces = [
        _Piece(wardrobe.paint(name, placement.matrix[0]), placement)
        for name, placement in placements.items()
    ]
    bench = scale if what.bench else None
    room = paint_room(rng, size, (view.x, view.y), bench, staging.size, camera.margin)
    worn = [_GARMENTS.get(name.rpartition("_")[2], "") for name in placements]
    clip = _Renderer(pieces, room, size, frames, camera).clip(caption(who, action), who, worn)
    return dataclasses.replace(clip, pose=_keypoints(joints_at), elsewhere=staging != USUAL)


def _keypoints(points: dict[str, np.ndarray]) -> torch.Tensor:
    """Joints (N, 2) by name as `pose_flow` takes them, (N, 1, 18, 3): without eyes and ears."""
    frames = len(points["neck"])
    found = np.zeros((frames, 1, len(JOINTS), 3), np.float32)
    for number, name in enumerate(JOINTS):
        if name in points:
            found[:, 0, number, :2] = points[name]
            found[:, 0, number, 2] = 1
    return torch.from_numpy(found)


class _Piece:
    """A texture with its placements, and the maps from pixels back to texels."""

    def __init__(self, canvas, placement: Placement) -> None:
        self.solid = canvas.alpha >= 0.5
        self.rgb = canvas.rgb
        self.depth = placement.depth
        self.matrix, self.origin = placement.matrix, placement.origin
        self.inverse = np.linalg.inv(placement.matrix)
        height, width = self.solid.shape
        left, top, density = canvas.left, canvas.top, canvas.density
        corners = np.array([(0, 0), (width, 0), (0, height), (width, height)]) / density
        corner = np.array([left, top])
        self._corners = corners + corner
        # Texel (row, column) of a pixel p: density * (inverse @ (p - origin) - (left, top)).
        self._to_texel = density * self.inverse
        shift = np.einsum("nij,nj->ni", self.inverse, self.origin) + corner
        self._offset = -density * shift

    def backward(self, frame: int) -> np.ndarray:
        """(2, 3) affine map from a pixel of `frame` to its displacement into frame 1."""
        linear = self.matrix[0] @ self.inverse[frame]
        shift = self.origin[0] - linear @ self.origin[frame]
        return np.concatenate([linear - np.eye(2), shift[:, None]], axis=1)

    def texels(self, frame: int, size: int):
        """The samples this piece covers: slices into the sample grid, a mask, texel indices."""
        reach = self._corners @ self.matrix[frame].T + self.origin[frame]
        low = np.floor((reach.min(0) + 0.5) * _SUB).astype(int)
        high = np.ceil((reach.max(0) + 0.5) * _SUB).astype(int)
        (x0, y0), (x1, y1) = np.clip(low, 0, size * _SUB), np.clip(high, 0, size * _SUB)
        if x0 >= x1 or y0 >= y1:
            return None
        xs = ((np.arange(x0, x1) + 0.5) / _SUB - 0.5)[None, :]
        ys = ((np.arange(y0, y1) + 0.5) / _SUB - 0.5)[:, None]
        (a, b), (c, d) = self._to_texel[frame]
        e, f = self._offset[frame]
        column = np.floor(a * xs + (b * ys + e)).astype(np.int32)
        row = np.floor(c * xs + (d * ys + f)).astype(np.int32)
        height, width = self.solid.shape
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        texel = np.where(inside, row * width + column, 0)
        mask = inside & self.solid.ravel()[texel]
        return (slice(y0, y1), slice(x0, x1)), mask, texel


class _Renderer:
    def __init__(
        self, pieces: list[_Piece], room: np.ndarray, size: int, frames: int, camera: Camera
    ) -> None:
        self._pieces, self._room, self._size, self._frames = pieces, room, size, frames
        self._camera = camera
        counts = np.array([piece.solid.size for piece in pieces])
        self._first = np.concatenate([[0], np.cumsum(counts)[:-1]]) + 1  # texel 0: the room
        colours = [np.zeros((1, 3), np.float32)] + [piece.rgb.reshape(-1, 3) for piece in pieces]
        self._atlas = np.clip(np.concatenate(colours), 0, 1)
        self._owner = np.concatenate([[0], np.repeat(np.arange(1, len(pieces) + 1), counts)])
        self._owner = self._owner.astype(np.uint8)

    def clip(self, words: str, who: Person, worn: list[str]) -> Clip:
        size, frames = self._size, self._frames
        video = np.empty((frames, size, size, 3), np.float32)
        displacement = np.zeros((frames, 2, size, size), np.float32)
        occlusion = np.zeros((frames, 1, size, size), np.float32)
        still = np.ones((size, size), bool)
        first = None
        for i in range(frames):
            samples = self._samples(i)
            window, cut = self._window(samples)
            owners = self._blocks(self._owner[samples[cut]])
            covered = (owners > 0).sum(-1)
            still[window] &= covered == 0
            still &= self._camera.still
            share = covered[..., None].astype(np.float32) / _SUB**2
            colours = self._blocks(samples[cut])
            video[i] = self._camera.picture(self._room, i)
            video[i][window] *= 1 - share
            for k in range(_SUB**2):
                video[i][window] += self._atlas[colours[..., k]] / _SUB**2
            # The middle of nine sorted owners is the majority wherever there is one.
            majority = np.zeros((size, size), np.uint8)
            majority[window] = np.partition(owners, _SUB**2 // 2, axis=-1)[..., _SUB**2 // 2]
            if first is None:
                first = self._owner[samples]
                seen = np.array(["", *worn])[majority]
            else:
                displacement[i], occlusion[i, 0] = self._flow(i, majority, first)
        return Clip(
            frames=torch.from_numpy(video.transpose(0, 3, 1, 2).copy()),
            flow=FlowField(
                displacement=torch.from_numpy(displacement), occlusion=torch.from_numpy(occlusion)
            ),
            caption=words,
            still=torch.from_numpy(still)[None, None],
            garments=tuple(
                Garment(name, colour, palette, torch.from_numpy(seen == name))
                for name, colour, palette in (
                    ("top", who.top_colour, TOP_COLOURS),
                    ("trousers", who.trousers_colour, TROUSER_COLOURS),
                )
            ),
        )

    def _samples(self, frame: int) -> np.ndarray:
        """Atlas index of every sample of `frame`, painted from the back to the front."""
        samples = np.zeros((self._size * _SUB,) * 2, np.int32)
        for k in sorted(range(len(self._pieces)), key=lambda k: self._pieces[k].depth[frame]):
            found = self._pieces[k].texels(frame, self._size)
            if found is not None:
                where, mask, texel = found
                samples[where][mask] = texel[mask] + self._first[k]
        return samples

    def _window(self, samples: np.ndarray):
        """The pixels that the figure touches, as slices of the picture and of the samples."""
        window, cut = [], []
        for axis in (1, 0):
            used = np.flatnonzero(samples.any(axis))
            low, high = (used[0] // _SUB, used[-1] // _SUB + 1) if len(used) else (0, 1)
            window.append(slice(low, high))
            cut.append(slice(low * _SUB, high * _SUB))
        return tuple(window), tuple(cut)

    def _blocks(self, samples: np.ndarray) -> np.ndarray:
        """(h, w, samples per pixel)."""
        height, width = (n // _SUB for n in samples.shape)
        blocks = samples.reshape(height, _SUB, width, _SUB).transpose(0, 2, 1, 3)
        return blocks.reshape(height, width, _SUB**2)

    def _flow(self, frame: int, owner: np.ndarray, first: np.ndarray):
        """Displacement (2, H, W) and occlusion (H, W) from the owner (H, W) of each pixel."""
        size = self._size
        maps = np.concatenate(
            [
                self._camera.backward(frame)[None],
                np.stack([piece.backward(frame) for piece in self._pieces]),
            ]
        ).astype(np.float32)
        rows, columns = np.mgrid[:size, :size].astype(np.float32)
        own = maps[owner]
        d = own[..., 0] * columns[..., None] + own[..., 1] * rows[..., None] + own[..., 2]
        x, y = columns + d[..., 0], rows + d[..., 1]
        outside = (x < -0.5) | (x > size - 0.5) | (y < -0.5) | (y > size - 0.5)
        sx, sy = (x + 0.5) * _SUB - 0.5, (y + 0.5) * _SUB - 0.5
        seen = np.zeros((size, size), bool)
        for dx, dy in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
            column = np.clip(np.rint(sx + dx), 0, size * _SUB - 1).astype(int)
            row = np.clip(np.rint(sy + dy), 0, size * _SUB - 1).astype(int)
            seen |= first[row, column] == owner
        return d.transpose(2, 0, 1), (outside | ~seen).astype(np.float32)
