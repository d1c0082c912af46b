"""Where a person stands, at which size, and how the camera moves: exact, like all that moves.

The camera is an affine map of the picture for each moment. It acts on the placements of the pieces,
and on the room as on one more piece.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...flow.geometry import sample_at
from .skeleton import Placement

Array = np.ndarray

_MARGIN = 26  # pixels of a 128-pixel clip: what the camera may turn to
_SIDEWAYS, _UP = 18.0, 3.0
_CLOSER = 0.04


@dataclass(frozen=True)
class Staging:
    """How a clip is staged; lengths are pixels of a 128-pixel clip.

    Attributes:
        place: by how much the person stands further to the right and further down.
        size: of the person, 1 is the usual one.
        pan: by how much the picture moves to the right and down from the first frame to the last,
            at most 18 and 3.
        zoom: size of the last picture over that of the first, 0.96 to 1.04.
    """

    place: tuple[float, float] = (0.0, 0.0)
    size: float = 1.0
    pan: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"Expected a size above 0, got {self.size:g}.")
        right, down = self.pan
        if abs(right) > _SIDEWAYS or abs(down) > _UP or abs(self.zoom - 1) > _CLOSER + 1e-9:
            raise ValueError(
                f"Expected a pan of at most {_SIDEWAYS:g} and {_UP:g} pixels and a zoom of "
                f"{1 - _CLOSER:g} to {1 + _CLOSER:g}, got {self.pan} and {self.zoom:g}."
            )

    def camera(self, size: int, frames: int) -> Camera:
        """The camera of a clip of so many frames, `size` pixels high and wide."""
        moments = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
        pan = moments[:, None] * np.array(self.pan) * size / 128
        return Camera(size, self.zoom**moments, pan)


#: In the middle, before a camera that stands still.
USUAL = Staging()


def draw_staging(rng: np.random.Generator) -> Staging:
    """Another place and another size; in half of all draws the camera pans and zooms slowly."""
    staging = Staging(place=(rng.uniform(-24, 24), rng.uniform(-5, 4)), size=rng.uniform(0.6, 1.1))
    if rng.random() < 0.5:
        return staging
    return dataclasses.replace(
        staging,
        pan=(rng.uniform(-_SIDEWAYS, _SIDEWAYS), rng.uniform(-_UP, _UP)),
        zoom=1 + rng.uniform(-_CLOSER, _CLOSER),
    )


@dataclass(frozen=True)
class Camera:
    """Affine maps of the picture: at frame i a pixel p of the scene is seen at
    centre + zoom_i (p - centre) + pan_i.

    Attributes:
        size: height and width of the picture.
        zoom: (N,), 1 at frame 1.
        pan: (N, 2) pixels, zero at frame 1.
    """

    size: int
    zoom: Array
    pan: Array

    @cached_property
    def still(self) -> bool:
        return bool((self.zoom == 1).all() and (self.pan == 0).all())

    @property
    def margin(self) -> int:
        """Pixels of the scene beyond each edge of the picture that may be seen."""
        return 0 if self.still else int(np.ceil(_MARGIN * self.size / 128))

    def film(self, placement: Placement) -> Placement:
        """Where a piece of the scene is seen."""
        if self.still:
            return placement
        matrix = self.zoom[:, None, None] * placement.matrix
        return Placement(matrix, self.points(placement.origin), placement.depth)

    def points(self, scene: Array) -> Array:
        """Where points of the scene are seen, one in each frame: (N, 2) pixels."""
        if self.still:
            return scene
        centre = (self.size - 1) / 2
        return centre + self.zoom[:, None] * (scene - centre) + self.pan

    def backward(self, frame: int) -> Array:
        """(2, 3) affine map from a pixel of the room in `frame` to its way back into frame 1."""
        centre, zoom = (self.size - 1) / 2, self.zoom[frame]
        shift = centre - (centre + self.pan[frame]) / zoom
        return np.concatenate([(1 / zoom - 1) * np.eye(2), shift[:, None]], axis=1)

    def picture(self, room: Array, frame: int) -> Array:
        """What is seen of the room (size + 2 margin, size + 2 margin, 3) in `frame`."""
        if self.still:
            return room
        rows, columns = np.mgrid[: self.size, : self.size]
        moves = self.backward(frame)
        pixels = np.stack([columns, rows])
        position = pixels + np.einsum("ij,jhw->ihw", moves[:, :2], pixels) + moves[:, 2:, None]
        seen = sample_at(
            torch.from_numpy(room).permute(2, 0, 1)[None],
            torch.from_numpy((position + self.margin).astype(np.float32))[None],
        )
        return seen[0].permute(1, 2, 0).numpy()
