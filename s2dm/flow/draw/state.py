"""What is drawn: layers with their tracks, and the camera over them.

Coordinates are pixels of the motion's own size, pixel centres at integers, x to the right and y
down. docs/motion.md describes the JSON that these values are read from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MOVES = ("rigid", "similarity", "affine", "free")
SPEEDS = ("linear", "ease", "ease_in", "ease_out", "hold")
REPEATS = ("once", "loop", "ping_pong")


@dataclass(frozen=True, eq=False)
class Polygon:
    """The inside of a closed line, by its winding number, as a canvas fills it.

    corners: (n,2), x and y in pixels.
    """

    corners: Array


@dataclass(frozen=True, eq=False)
class Mask:
    """A part of the picture as cells of any size: (h,w) bool, stretched over the whole picture."""

    cells: Array


@dataclass(frozen=True, eq=False)
class Layer:
    """A part of the picture and how it moves.

    region: what belongs to it. None: the surroundings of each track, all of it within `radius`
        pixels of where the track starts, less and less up to twice as far.
    tracks: (n,3) each: x, y and the time in [0, 1] of every point, in order.
    pins: (n,2), points that stay where they are.
    move: how the layer follows its tracks and pins. "rigid", "similarity" and "affine" are one
        such map for all of it; "free" bends it, rigidly between a few of them and stretching
        in a crowd. A track alone moves it as it is.
    speed, repeat, cycles: how time runs along the tracks, see `timing`.
    """

    name: str = ""
    region: Polygon | Mask | None = None
    tracks: tuple[Array, ...] = ()
    pins: Array = field(default_factory=lambda: np.zeros((0, 2)))
    radius: float = 16.0
    move: str = "free"
    speed: str = "linear"
    repeat: str = "once"
    cycles: float = 1.0


@dataclass(frozen=True)
class CameraKey:
    """Where the camera is at a time in [0, 1]: pan in pixels, zoom factor, roll in degrees."""

    t: float
    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    roll: float = 0.0


@dataclass(frozen=True, eq=False)
class Motion:
    """Layers from the back to the front, and the camera's keys in order of time.

    num_frames: what the drawing was made for; it can be rendered with any number.
    camera_speed: how time runs along the camera's keys, see `timing.eased`.
    """

    width: int
    height: int
    layers: tuple[Layer, ...] = ()
    camera: tuple[CameraKey, ...] = ()
    num_frames: int | None = None
    camera_speed: str = "linear"

    def resize(self, width: int, height: int) -> Motion:
        """The same motion drawn on a picture of another size."""
        if (width, height) == (self.width, self.height):
            return self
        factor = np.array([width / self.width, height / self.height])

        def moved(points: Array) -> Array:
            return np.concatenate([(points[:, :2] + 0.5) * factor - 0.5, points[:, 2:]], axis=1)

        layers = tuple(
            replace(
                layer,
                region=(
                    Polygon(moved(layer.region.corners))
                    if isinstance(layer.region, Polygon)
                    else layer.region
                ),
                tracks=tuple(moved(track) for track in layer.tracks),
                pins=moved(layer.pins),
                radius=layer.radius * sqrt(factor[0] * factor[1]),
            )
            for layer in self.layers
        )
        camera = tuple(
            replace(key, x=key.x * float(factor[0]), y=key.y * float(factor[1]))
            for key in self.camera
        )
        return replace(self, width=width, height=height, layers=layers, camera=camera)
