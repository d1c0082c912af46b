"""From drawn layers to the flow of a clip.

Tracks go forward in time, flow goes back to frame 1. So in each frame every layer is laid over the
picture, from the back to the front, and each pixel keeps the point of frame 1 that came to lie
there. It is visible in frame 1 if that layer was on top there, too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from torch import Tensor

from ..field import FlowError, FlowField
from .camera import View, views
from .deform import Bend, complex_points, falloff, fit
from .mesh import Mesh
from .regions import Cells, cells_per_pixel, rasterise
from .state import Array, Layer, Motion
from .timing import phases, positions

_CELL, _CELLS = 2, 128  # pixels: the smallest cell of a bent layer, and cells along its side
_NEAR = 1.6  # cells: how far around a track the sheet doesn't bend, so that pixels there are exact
_WEIGHTS = 4_000_000  # vertices times tracks at most: more tracks have larger cells
_STILL = 0.02  # pixels: what moves less is drawn as what lies there
_TEAR = 3.0  # by how much surroundings, or what parallax draws apart, may be stretched
_TEAR_REGION = 16.0  # what has an outline of its own stays in one piece
_BESIDE = 1 / 3  # pixels: how far from its centre a pixel is looked for, too
_THREADS = 4  # at most; each needs room for a frame
_NOTHING = -1  # the layer where nothing of frame 1 is known to be


@dataclass(frozen=True, eq=False)
class Drawing:
    """What was drawn, as a clip.

    flow: the motion. cover: (N,1,H,W) bool, where a layer lies on the ground.
    """

    flow: FlowField
    cover: Tensor


def render(motion: Motion, num_frames: int, depth: Tensor | None = None) -> Drawing:
    """The flow of a drawn motion, in pixels of the motion's own size.

    num_frames: 1 or more. depth: (1,1,H,W) in [0, 1], how near frame 1 is at each pixel; the
    near moves with the whole pan of the camera, the far (0) with none. A layer with a region has
    one depth, the mean of it.

    Displacement is exact: whatever lies on the centre of a pixel in frame i says where it was.
    Occluded is what frame 1 doesn't show: a layer's place that it has left, what was hidden by
    another layer, what comes into the picture from outside, and where the picture is torn.

    The result takes 13 bytes a pixel and frame; what is needed beside it doesn't grow with the
    number of frames.
    """
    if num_frames < 1:
        raise FlowError(f"frames: expected at least 1, got {num_frames}.")
    return _Scene(motion, num_frames, _checked_depth(depth, motion)).drawing()


def _checked_depth(depth: Tensor | None, motion: Motion) -> Array | None:
    if depth is None:
        return None
    if tuple(depth.shape) != (1, 1, motion.height, motion.width):
        raise FlowError(
            f"depth: expected (1,1,{motion.height},{motion.width}), one picture as large as the "
            f"motion, got {tuple(depth.shape)}."
        )
    values = depth[0, 0].detach().double().cpu()
    if not torch.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise FlowError("depth: expected values in [0, 1], near is 1, got others.")
    return values.numpy()


class _Scene:
    """All layers of a motion, ready to be drawn at any frame."""

    def __init__(self, motion: Motion, num_frames: int, depth: Array | None) -> None:
        width, height = motion.width, motion.height
        self.width, self.height, self.num_frames = width, height, num_frames
        self.fine = cells_per_pixel(width, height)
        times = phases(num_frames, motion.camera_speed)
        self.views = views(motion.camera, times, width, height)
        self.ground = _DeepGround(self, depth) if depth is not None else None
        # The topmost layer of every cell of frame 1, 0 for the ground.
        self.owners = np.zeros((height * self.fine, width * self.fine), np.int16)
        self.layers: list[_Piece | _Surroundings] = []
        for layer in motion.layers:
            number = len(self.layers) + 1
            if layer.region is None:
                if layer.tracks:
                    self.layers.append(_Surroundings(self, number, layer, depth))
                continue
            cells = rasterise(layer.region, width, height)
            if cells is not None:
                self.owners[cells.window][cells.cells] = number
                self.layers.append(_Piece(self, number, layer, cells, depth))
        self.x = np.arange(width, dtype=np.float32)
        self.y = np.arange(height, dtype=np.float32)
        self.pixels = np.arange(height * width, dtype=np.int32).reshape(height, width)
        # Of the ground at rest, which is most of most pictures, the same is seen in all frames.
        still = View(np.eye(2), np.zeros(2), np.zeros(2))
        self.bare = _Canvas(self, still, self.owners).visible()

    def drawing(self) -> Drawing:
        shape = (self.num_frames, self.height, self.width)
        displacement = np.empty((shape[0], 2, *shape[1:]), np.float32)
        occlusion = np.empty((shape[0], 1, *shape[1:]), np.float32)
        cover = np.empty(occlusion.shape, bool)
        elastic = any(isinstance(layer, _Surroundings) for layer in self.layers)

        def draw(frame: int) -> None:
            view = self.views[frame]
            canvas = _Canvas(self, view, self.owners.copy() if elastic else self.owners)
            if self.ground is not None:
                self.ground.draw(canvas)
            for layer in self.layers:
                layer.draw(canvas, frame)
            np.subtract(canvas.place[0], self.x[None, :], out=displacement[frame, 0])
            np.subtract(canvas.place[1], self.y[:, None], out=displacement[frame, 1])
            known = self.bare if view.still and not elastic else None
            occlusion[frame, 0] = ~canvas.visible(known)
            np.greater(canvas.layer, 0, out=cover[frame, 0])

        # Frames don't know of one another, and NumPy lets others run while it works.
        with ThreadPoolExecutor(min(torch.get_num_threads(), _THREADS)) as pool:
            for _ in pool.map(draw, range(self.num_frames)):
                pass
        displacement[0] = occlusion[0] = 0
        flow = FlowField(torch.from_numpy(displacement), torch.from_numpy(occlusion))
        return Drawing(flow, torch.from_numpy(cover))


class _Canvas:
    """A frame that is drawn: for each pixel the point of frame 1 that lies there, and its layer.

    owners: the topmost layer of every cell of frame 1. Layers without a region enter themselves.
    """

    def __init__(self, scene: _Scene, view: View, owners: Array) -> None:
        self.scene, self.view, self.owners = scene, view, owners
        shape = (scene.height, scene.width)
        self.layer = np.zeros(shape, np.int16)
        self.place = np.empty((2, *shape), np.float32)
        if view.still:
            self.place[0], self.place[1] = scene.x[None, :], scene.y[:, None]
        else:
            # The ground reaches beyond the picture: what is unknown moves on as it does.
            far = 1.0 if scene.ground is None else scene.ground.far
            back = _inverse(view.over(np.eye(2, 3), far))
            assert back is not None  # a camera's zoom is above 0
            self.place[:] = _applied(back, scene.x, scene.y)
            if scene.ground is not None:
                self.layer[:] = _NOTHING

    def put(self, number: int, pixels: Array, points: Array) -> None:
        """Draw points (2,M) of a layer onto pixels (M,), flat indices."""
        self.place[0].reshape(-1)[pixels] = points[0]
        self.place[1].reshape(-1)[pixels] = points[1]
        self.layer.reshape(-1)[pixels] = number

    def visible(self, ground: Array | None = None) -> Array:
        """(H,W) bool, whether frame 1 shows the pixel: its layer is the topmost one there.

        ground: what is visible of the ground, if it is at rest.
        """
        layer, (x, y) = self.layer.reshape(-1), self.place.reshape(2, -1)
        asked = None
        if ground is not None:
            asked = np.flatnonzero(layer)
            x, y, layer = x[asked], y[asked], layer[asked]
        width, height = self.scene.width, self.scene.height
        inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
        seen = self._shows(x, y, layer) & inside
        # A pixel is a square: it is seen if its middle third is, or a third beside that.
        for beside in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            left = np.flatnonzero(inside & ~seen)
            right, down = (np.float32(step * _BESIDE) for step in beside)
            seen[left] = self._shows(x[left] + right, y[left] + down, layer[left])
        if ground is None or asked is None:
            return seen.reshape(self.layer.shape)
        visible = ground & (self.layer == 0)
        visible.reshape(-1)[asked] = seen
        return visible

    def _shows(self, x: Array, y: Array, layer: Array) -> Array:
        """Whether these layers are the topmost ones at these points (the nearest, if outside)."""
        rows, columns = self.owners.shape
        index = self._cells(y, rows) * np.int32(columns)
        index += self._cells(x, columns)
        return self.owners.reshape(-1)[index] == layer

    def _cells(self, places: Array, count: int) -> Array:
        """Rows or columns of the fine grid, which has so many, at these places."""
        cells = places + np.float32(0.5)
        cells *= np.float32(self.scene.fine)
        return np.clip(cells, 0, count - 1, out=cells).astype(np.int32)


class _Piece:
    """A layer with a region."""

    def __init__(
        self, scene: _Scene, number: int, layer: Layer, cells: Cells, depth: Array | None
    ) -> None:
        self.scene, self.number, self.cells = scene, number, cells
        fine = scene.fine
        height, width = cells.cells.shape
        # The box of the region in pixels, its outer edges.
        self.box = np.array([cells.left, cells.top, cells.left + width, cells.top + height]) / fine
        self.box -= 0.5
        self.depth = 1.0
        if depth is not None:
            rows, columns = np.nonzero(cells.cells)
            y, x = (rows + cells.top) // fine, (columns + cells.left) // fine
            self.depth = float(depth[y, x].mean())
        rest, moved, pins = _controls(layer, scene.num_frames)
        self.moved = moved
        self.bend: Bend | None = None
        if len(rest) < 2 or layer.move != "free":
            move = "rigid" if layer.move == "free" else layer.move
            self.maps = fit(rest, moved, pins, move) if len(rest) else _identity(scene.num_frames)
            return
        left, top = (int(np.floor(side + 0.5)) for side in self.box[:2])
        right, bottom = (int(np.ceil(side + 0.5)) for side in self.box[2:])
        self.mesh = _mesh_over(left, top, right, bottom, len(rest))
        self.mesh.hold(rest)
        self.bend = Bend(self.mesh.vertices, rest, _NEAR * self.mesh.side)

    def draw(self, canvas: _Canvas, frame: int) -> None:
        if self.bend is None:
            self._draw_flat(canvas, canvas.view.over(self.maps[frame], self.depth))
            return
        places, scene = self.moved[frame], self.scene
        moved = canvas.view.show(self.mesh.met(self.bend.at(places), places), self.depth)
        tear = _TEAR_REGION * _size(canvas.view.linear)
        pixels, points = self.mesh.drawn(moved, scene.width, scene.height, tear)
        mine = self._held(points)
        canvas.put(self.number, pixels[mine], points[:, mine])

    def _draw_flat(self, canvas: _Canvas, forward: Array) -> None:
        back = _inverse(forward)
        if back is None:  # shrunk to a line or a point
            return
        x0, y0, x1, y1 = self.box
        corners = np.array([[x0, x1, x0, x1], [y0, y0, y1, y1]])
        reach = forward[:, :2] @ corners + forward[:, 2:]
        size = np.array([self.scene.width, self.scene.height])
        low = np.clip(np.floor(reach.min(1)), 0, size).astype(int)
        high = np.clip(np.ceil(reach.max(1)) + 1, 0, size).astype(int)
        if (low >= high).any():
            return
        columns, rows = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        points = _applied(back, self.scene.x[columns], self.scene.y[rows]).reshape(2, -1)
        mine = self._held(points)
        pixels = self.scene.pixels[rows, columns].reshape(-1)[mine]
        canvas.put(self.number, pixels, points[:, mine])

    def _held(self, points: Array) -> Array:
        """Which of the points (2,M) of frame 1 belong to the region, as indices."""
        cells = self.cells
        corner = (cells.left, cells.top)
        inside, index = _cells_at(points, self.scene.fine, corner, cells.cells.shape)
        return inside[cells.cells.reshape(-1)[index]]


class _Surroundings:
    """A layer without a region: tracks carry what is around them, like a sheet of rubber.

    Where it doesn't move in a frame it isn't there: what lies below shows, and is the ground's.
    """

    def __init__(self, scene: _Scene, number: int, layer: Layer, depth: Array | None) -> None:
        self.scene, self.number = scene, number
        rest, self.moved, pins = _controls(layer, scene.num_frames)
        starts = rest[: len(rest) - pins]
        reach = 2 * max(layer.radius, _NEAR * _CELL)
        size = (scene.width, scene.height)
        (left, right), (top, bottom) = (
            np.clip([np.floor(place.min() - reach), np.ceil(place.max() + reach) + 1], 0, side)
            .astype(int)
            .tolist()
            for place, side in zip((starts.real, starts.imag), size, strict=True)
        )
        self.mesh: Mesh | None = None
        if left >= right or top >= bottom:
            return
        self.mesh = _mesh_over(left, top, right, bottom, len(rest))
        vertices = self.mesh.vertices
        self.mesh.hold(rest)
        distance = np.full(len(vertices), np.inf)
        for start in starts:
            np.minimum(distance, np.abs(vertices - start), out=distance)
        near = _NEAR * self.mesh.side
        self.share = np.where(distance < near, 1, falloff(distance, layer.radius))
        self.mesh.order(self.share)
        self.maps = None if layer.move == "free" else fit(rest, self.moved, pins, layer.move)
        self.bend = Bend(vertices, rest, near, layer.radius) if self.maps is None else None
        self.depth: Array | float = 1.0
        if depth is not None:
            column, row = (
                np.clip(np.rint(values), 0, side - 1).astype(int)
                for values, side in zip((vertices.real, vertices.imag), size, strict=True)
            )
            self.depth = depth[row, column]

    def _offsets(self, frame: int) -> Array:
        """How far every vertex has moved in the picture, (V,) complex."""
        assert self.mesh is not None
        vertices = self.mesh.vertices
        if self.bend is not None:
            moved = self.bend.at(self.moved[frame])
        else:
            assert self.maps is not None
            flat = np.stack([vertices.real, vertices.imag, np.ones(len(vertices))])
            moved = complex_points((self.maps[frame] @ flat).T)
        moved = np.where(self.share > 0, vertices + self.share * (moved - vertices), vertices)
        if self.bend is not None:
            moved = self.mesh.met(moved, self.moved[frame])
        return moved - vertices

    def _moving(self, offsets: Array) -> Array:
        """(rows,columns) bool, the cells that move."""
        assert self.mesh is not None
        corner = (np.abs(offsets) > _STILL).reshape(self.mesh.rows + 1, self.mesh.columns + 1)
        return corner[:-1, :-1] | corner[:-1, 1:] | corner[1:, :-1] | corner[1:, 1:]

    def draw(self, canvas: _Canvas, frame: int) -> None:
        if self.mesh is None:
            return
        offsets = self._offsets(frame)
        moving = self._moving(offsets)
        if moving.any():
            moved = canvas.view.show(self.mesh.vertices + offsets, self.depth)
            width, height = self.scene.width, self.scene.height
            tear = _TEAR * _size(canvas.view.linear)
            canvas.put(self.number, *self.mesh.drawn(moved, width, height, tear, moving))
            self._own(canvas.owners, moving)

    def _own(self, owners: Array, moving: Array) -> None:
        """Enter the cells that move into `owners`, where no layer lies above."""
        assert self.mesh is not None
        mesh, fine = self.mesh, self.scene.fine
        step = mesh.side * fine
        moving = moving.repeat(step, axis=0).repeat(step, axis=1)
        part = owners[mesh.top * fine :, mesh.left * fine :][: len(moving), : moving.shape[1]]
        moving = moving[: part.shape[0], : part.shape[1]]
        part[moving & (part < self.number)] = self.number


class _DeepGround:
    """The ground with parallax: the near moves further than the far when the camera pans."""

    def __init__(self, scene: _Scene, depth: Array) -> None:
        self.scene = scene
        self.far = float(depth.min())
        side = max(1, round(max(scene.width, scene.height) / 256))
        columns, rows = -(-scene.width // side), -(-scene.height // side)
        self.mesh = Mesh(0, 0, columns, rows, side)
        vertices = self.mesh.vertices
        column = np.clip(np.rint(vertices.real), 0, scene.width - 1).astype(int)
        row = np.clip(np.rint(vertices.imag), 0, scene.height - 1).astype(int)
        self.depth = depth[row, column]
        self.mesh.order(self.depth)

    def draw(self, canvas: _Canvas) -> None:
        if canvas.view.still:
            return
        moved = canvas.view.show(self.mesh.vertices, self.depth)
        width, height = self.scene.width, self.scene.height
        tear = _TEAR * _size(canvas.view.linear)
        canvas.put(0, *self.mesh.drawn(moved, width, height, tear))


def _controls(layer: Layer, num_frames: int) -> tuple[Array, Array, int]:
    """Tracks and pins: where they are in frame 1 (K,), in every frame (N,K), the number of pins."""
    phase = phases(num_frames, layer.speed, layer.repeat, layer.cycles)
    tracks = [complex_points(positions(track, phase, layer.speed)) for track in layer.tracks]
    pins = complex_points(layer.pins)
    still = np.broadcast_to(pins, (num_frames, len(pins)))
    moved = np.concatenate([np.stack(tracks, axis=1), still], axis=1) if tracks else still
    return moved[0], moved, len(pins)


def _cells_at(
    points: Array, fine: int, corner: tuple[int, int], shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Which of the points (2,M) lie in a part of the fine grid, and the cells there, flat.

    All in float32, as places are kept: whoever asks again about a point gets the same cell.
    """
    column, row = ((values + np.float32(0.5)) * np.float32(fine) for values in points)
    column -= corner[0]
    row -= corner[1]
    height, width = shape
    inside = np.flatnonzero((column >= 0) & (column < width) & (row >= 0) & (row < height))
    index = row[inside].astype(np.int32) * np.int32(width)
    index += column[inside].astype(np.int32)
    return inside, index


def _mesh_over(left: int, top: int, right: int, bottom: int, controls: int) -> Mesh:
    """Over a part of the picture, from pixel to pixel, for so many tracks and pins."""
    width, height = right - left, bottom - top
    area = width * height
    side = max(_CELL, ceil(sqrt(area) / _CELLS), ceil(sqrt(area * controls / _WEIGHTS)))
    return Mesh(left, top, -(-width // side), -(-height // side), side)


def _identity(count: int) -> Array:
    return np.broadcast_to(np.eye(2, 3), (count, 2, 3))


def _inverse(forward: Array) -> Array | None:
    """The inverse of a map (2,3), (2,3); None if there is none."""
    (a, b, e), (c, d, f) = forward
    area = a * d - b * c
    if abs(area) < 1e-8:
        return None
    linear = np.array([[d, -b], [-c, a]]) / area
    return np.concatenate([linear, -linear @ np.array([[e], [f]])], axis=1)


def _applied(back: Array, x: Array, y: Array) -> Array:
    """A map (2,3) at all of these columns and rows, (2,h,w) float32."""
    points = np.empty((2, len(y), len(x)), np.float32)
    for point, (a, b, c) in zip(points, back, strict=True):
        np.add((a * x)[None, :], (b * y + c)[:, None], out=point, casting="same_kind")
    return points


def _size(linear: Array) -> float:
    """By how much the camera enlarges, 1 at most times less."""
    return max(1.0, float(np.sqrt(abs(np.linalg.det(linear)))))
