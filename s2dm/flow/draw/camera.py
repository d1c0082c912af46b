"""The camera over the drawing: pan, zoom and roll."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .state import Array, CameraKey


@dataclass(frozen=True, eq=False)
class View:
    """How the camera of a frame shows frame 1.

    A point p appears at centre + linear @ (p - centre) - depth * pan, with a depth of 1 unless
    the picture has parallax.

    linear: (2,2). pan: (2,). centre: (2,).
    """

    linear: Array
    pan: Array
    centre: Array

    @property
    def still(self) -> bool:
        """Whether it shows frame 1 as it is."""
        return bool((self.linear == np.eye(2)).all() and (self.pan == 0).all())

    def over(self, motion: Array, depth: float = 1.0) -> Array:
        """A map (2,3) of frame 1 that is seen through the camera, (2,3)."""
        linear = self.linear @ motion[:, :2]
        shift = self.linear @ (motion[:, 2] - self.centre) + self.centre - depth * self.pan
        return np.concatenate([linear, shift[:, None]], axis=1)

    def show(self, points: Array, depth: Array | float = 1.0) -> Array:
        """Where points (V,) complex appear, (V,) complex; depth: of each, or of all."""
        (a, b), (c, d) = self.linear
        x, y = points.real - self.centre[0], points.imag - self.centre[1]
        right = a * x + b * y + self.centre[0] - depth * self.pan[0]
        down = c * x + d * y + self.centre[1] - depth * self.pan[1]
        return right + 1j * down


def views(keys: Sequence[CameraKey], times: Array, width: int, height: int) -> list[View]:
    """The camera at each of the times (N,) in [0, 1].

    Between keys pan and roll go linearly, zoom by equal factors for equal times. Before a first
    key that isn't at time 0 stands one at rest, after the last one the camera stays. As frame 1
    is the picture itself, everything is seen from the camera's place at its first time.
    """
    keys = list(keys)
    if not keys or keys[0].t > 0:
        keys.insert(0, CameraKey(0.0))
    at = [key.t for key in keys]
    x, y, zoom, roll = (
        np.interp(times, at, values)
        for values in (
            [key.x for key in keys],
            [key.y for key in keys],
            [np.log(key.zoom) for key in keys],
            [np.deg2rad(key.roll) for key in keys],
        )
    )
    scale, cosine, sine = np.exp(zoom), np.cos(roll), np.sin(roll)
    # R(-roll): the camera turns clockwise, so the picture turns the other way.
    linear = np.array([[cosine, sine], [-sine, cosine]]).transpose(2, 0, 1) * scale[:, None, None]
    pan = np.stack([x, y], axis=1)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    if (pan[0] != 0).any() or scale[0] != 1 or roll[0] != 0:
        start = linear[0].copy()
        linear = linear @ np.linalg.inv(start)
        pan = pan - linear @ pan[0]
    return [View(*view, centre) for view in zip(linear, pan, strict=True)]
