"""How a layer follows its tracks and pins: one map for all of it, or bent between them.

A layer that bends follows moving least squares (Schaefer, McPhail and Warren, "Image deformation
using moving least squares", 2006): every point gets the map that fits tracks and pins best, near
ones more than far ones. It is rigid between few of them and affine in a crowd. Thin plates would be
as smooth, but they shear and swell what they bend; limbs, leaves and faces don't. Points of the
plane are complex numbers here, as a rotation then is a product.
"""

from __future__ import annotations

import numpy as np

from .state import Array

_PIN = 1000.0  # how much more a pin counts than a track where both can't be had
_NEAR = 1e-6  # square pixels: a point on a track follows that track alone
_LEAST = 1e-12  # square pixels: tracks that lie in one point turn nothing
_STEADY = 0.1  # without a region, how strongly surroundings keep from turning
_FIRM = 1.0  # how strongly they keep from being stretched
_CROWD = 0.1  # with a region, of the tracks' variance: about fifteen tracks stretch it by half


def complex_points(points: Array) -> Array:
    """(…,2) as (…) complex."""
    return points[..., 0] + 1j * points[..., 1]


def falloff(distance: Array, radius: float) -> Array:
    """1 up to the radius, then smoothly to 0 at twice as far."""
    beyond = np.clip(distance / radius - 1, 0, 1)
    return 1 - beyond * beyond * (3 - 2 * beyond)


def fit(rest: Array, moved: Array, num_pins: int, move: str) -> Array:
    """The maps that bring points of frame 1 best to where they are in each frame.

    rest: (K,) complex, the last `num_pins` of them pins. moved: (N,K). move: "rigid",
    "similarity" or "affine"; where there are too few points for that, the next simpler one.
    Returns (N,2,3): (x, y) goes to map @ (x, y, 1).
    """
    weight = np.ones(len(rest))
    weight[len(rest) - num_pins :] = _PIN
    weight /= weight.sum()
    centre, centres = rest @ weight, moved @ weight
    offset, offsets = rest - centre, moved - centres[:, None]
    spread = float(weight @ np.abs(offset) ** 2)
    count = len(moved)
    linear = np.broadcast_to(np.eye(2), (count, 2, 2)).copy()
    if spread > 1e-6:
        turn = offsets @ (weight * offset.conj())
        if move == "rigid":
            length = np.abs(turn)
            turn = np.where(length > 1e-9 * spread, turn / np.maximum(length, 1e-30), 1)
        else:
            turn = turn / spread
        linear = np.stack(
            [np.stack([turn.real, -turn.imag], -1), np.stack([turn.imag, turn.real], -1)], -2
        )
        if move == "affine":
            flat = np.stack([offset.real, offset.imag])
            moment = (flat * weight) @ flat.T
            if np.linalg.eigvalsh(moment)[0] > 1e-6 * spread:
                flats = np.stack([offsets.real, offsets.imag], axis=1)
                linear = (flats * weight) @ flat.T @ np.linalg.inv(moment)
    start = np.array([centre.real, centre.imag])
    shift = np.stack([centres.real, centres.imag], axis=1) - linear @ start
    return np.concatenate([linear, shift[:, :, None]], axis=2)


class Bend:
    """The bent surroundings of tracks and pins, at fixed points of frame 1.

    points: (V,) complex, where the deformation is asked for. rest: (K,) complex, tracks and pins
    in frame 1. near: up to this distance a point follows the map at the nearest of them, so that
    what is right around it doesn't bend. radius: how far each of them acts, and how close together
    they have to be to stretch what is around them. None: everywhere, and the more there are, the
    more they stretch it.
    """

    def __init__(
        self, points: Array, rest: Array, near: float, radius: float | None = None
    ) -> None:
        # Measured from the first of them, those that lie in one point are zero, here and in `at`:
        # what rounding would leave of them turns what is around.
        points, rest = points - rest[0], rest - rest[0]
        distance = np.abs(points[:, None] - rest[None, :])
        owner = distance.argmin(axis=1)
        close = np.flatnonzero(distance.min(axis=1) < near)
        owner = owner[close]
        distance[close] = np.abs(rest[owner][:, None] - rest[None, :])
        # The fourth power: around a track there is that track alone.
        square = distance**2 + _NEAR
        # Of a crowd, those that all but touch say little about how their surroundings turn.
        square[close] += (near / 2) ** 2
        weight = 1 / square**2
        if radius is not None:
            weight *= falloff(distance, radius)
        total = weight.sum(axis=1)
        self._share = weight / np.maximum(total, 1e-30)[:, None]
        self._share[close] = 0
        self._share[close, owner] = 1
        centre = self._share @ rest
        self._offset = np.where(total > 0, points - centre, 0)
        around = rest[None, :] - centre[:, None]
        self._turning = weight * around.conj()
        self._slant = (self._turning * around.conj()).sum(axis=1)
        spread = (weight * np.abs(around) ** 2).sum(axis=1)
        # With a sum of zero, it makes no difference whether `moved` is measured from its centre.
        self._turning[close, owner] -= self._turning[close].sum(axis=1)
        if radius is None:
            self._steady = _LEAST * total
            scale = max(float(np.var(rest)) * _CROWD, 1.0)
        else:
            self._steady = np.full(len(points), _STEADY / radius**2)
            scale = radius**2
        self._firm = _FIRM / scale + 1e-6 * spread
        self._spread = spread + self._firm

    def at(self, moved: Array) -> Array:
        """Where the points are when tracks and pins are at `moved` (K,), (V,) complex."""
        first, moved = moved[0], moved - moved[0]
        fitted = _weighted(self._turning, moved)
        turn = fitted + self._steady
        length = np.abs(turn)
        turn = np.where(length > 0, turn / np.maximum(length, 1e-300), 1)
        centre = first + _weighted(self._share, moved)
        # An affine map is a p + b p.conj(): here the one that fits best, held to p -> turn p.
        right = fitted + self._firm * turn
        left = _weighted(self._turning, moved.conj()).conj()
        area = self._spread**2 - np.abs(self._slant) ** 2
        a = (self._spread * right - self._slant * left) / area
        b = (self._spread * left - self._slant.conj() * right) / area
        return centre + a * self._offset + b * self._offset.conj()


def _weighted(weights: Array, values: Array) -> Array:
    """Sums (V,) of values (K,) with weights (V,K).

    A matrix product would start threads of its own in each of the frames that are drawn at once,
    and they wait for one another longer than these few products take.
    """
    return np.einsum("vk,k->v", weights, values)
