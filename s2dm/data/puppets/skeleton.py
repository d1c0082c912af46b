"""From keyframe values to the place of every rigid piece on the picture.

The skeleton is three-dimensional (x to image right, y up, z towards the viewer, in units of the
figure), the pieces are flat. A piece is placed by an affine map from its own coordinates to pixels:
rotation, perspective size, and foreshortening along a limb. Affine maps have exact inverses, which
is what makes the optical flow exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .persons import Person

Array = np.ndarray

_PITCH = np.radians(7.0)  # the camera looks down a little, so that a step forward moves down
_PERSPECTIVE = 240.0  # distance at which a thing moved towards the viewer doubles in size
_SHORTEST = 0.35  # a limb that points at the viewer keeps this share of its length
_BODY_DEPTH = 0.75  # depth of the trunk over its width


@dataclass(frozen=True)
class Body:
    """Measures of a person in units; one unit is one pixel of a 128-pixel clip."""

    trunk: float
    shoulder: float
    waist: float
    hip: float
    upper_arm: float
    forearm: float
    thigh: float
    shin: float
    foot: float
    girth: float

    @property
    def arm(self) -> float:
        return self.upper_arm + self.forearm

    @property
    def leg(self) -> float:
        return self.thigh + self.shin


def body(person: Person) -> Body:
    """The measures of `person`."""
    h, b = person.height, person.build
    man = person.gender == "man"
    return Body(
        trunk=28.0 * h,
        shoulder=(10.8 if man else 9.4) * b,
        waist=(9.0 if man else 7.4) * b,
        hip=(4.9 if man else 5.0) * b,
        upper_arm=13.5 * h,
        forearm=12.5 * h,
        thigh=16.5 * h,
        shin=16.0 * h,
        foot=3.6,
        girth=b,
    )


@dataclass(frozen=True)
class View:
    """Place of the figure: the point it stands on (pixels), pixels per unit, turn in degrees."""

    x: float
    y: float
    scale: float
    turn: float


@dataclass(frozen=True)
class Placement:
    """Affine maps from a piece's coordinates to pixels, and the depth that orders the pieces.

    `matrix` (N,2,2), `origin` (N,2), `depth` (N,): pixel = matrix @ point + origin.
    """

    matrix: Array
    origin: Array
    depth: Array


def joints(measures: Body, pose: dict[str, Array]) -> dict[str, Array]:
    """Where the joints of a figure are, (N,3) units each.

    Args:
        measures: the person's measures.
        pose: tracks as returned by `actions.poses`, N moments.

    Returns:
        By name: pelvis, neck, head (where it sits on the neck), and {right,left}_{shoulder, elbow,
        wrist, hip, knee, ankle}.
    """
    m = measures
    lean, bend, twist = (np.radians(pose[k][:, 0]) for k in ("lean", "bend", "twist"))
    hip_height = m.leg * 0.985 + m.foot
    pelvis = np.array([0.0, hip_height, 0.0]) + pose["root"] * m.leg
    spine = _unit(np.stack([np.sin(lean), np.cos(lean) * np.cos(bend), np.sin(bend)], 1))
    across = _unit(
        np.stack([np.cos(twist) * np.cos(lean), -np.sin(lean), -np.sin(twist)], 1)
    )  # from the spine to the shoulder on image right
    neck = pelvis + spine * m.trunk

    found = {"pelvis": pelvis, "neck": neck, "head": neck + spine * 1.0}
    for name, side, arm, leg in (("right", -1.0, "rh", "rf"), ("left", 1.0, "lh", "lf")):
        mirror = np.array([side, 1.0, 1.0])
        shoulder = neck + side * across * (m.shoulder - 1.5) - spine * 4.2
        hand = shoulder + pose[arm] * mirror * m.arm
        elbow, wrist = _bend(
            shoulder, hand, m.upper_arm, m.forearm, np.array([side * 0.65, -1.0, -0.35])
        )
        hip = pelvis + np.array([side * m.hip, 0.0, 0.0])
        rest = np.array([side * m.hip, m.foot, 0.0])
        step = rest + pose[leg] * mirror * m.leg
        knee, ankle = _bend(hip, step, m.thigh, m.shin, np.array([side * 0.25, 0.0, 1.0]))
        found |= {f"{name}_shoulder": shoulder, f"{name}_elbow": elbow, f"{name}_wrist": wrist}
        found |= {f"{name}_hip": hip, f"{name}_knee": knee, f"{name}_ankle": ankle}
    return found


def project(points: dict[str, Array], view: View) -> dict[str, Array]:
    """Points (N,3) of a figure in pixels, (N,2)."""
    camera = _Camera(view)
    return {name: camera.project(point)[0] for name, point in points.items()}


def place(measures: Body, pose: dict[str, Array], view: View) -> dict[str, Placement]:
    """Place every piece of a figure.

    Args:
        measures: the person's measures.
        pose: tracks as returned by `actions.poses`, N moments.
        view: where the figure stands.

    Returns:
        Placements by name: torso, pelvis, head, and {right,left}_{upper_arm, forearm, hand, thigh,
        shin, foot}.
    """
    m = measures
    frames = len(pose["root"])
    lean, twist = (np.radians(pose[k][:, 0]) for k in ("lean", "twist"))
    camera = _Camera(view)
    at = joints(measures, pose)

    result: dict[str, Placement] = {}
    for name in ("right", "left"):
        shoulder, elbow, wrist = (at[f"{name}_{joint}"] for joint in ("shoulder", "elbow", "wrist"))
        hip, knee, ankle = (at[f"{name}_{joint}"] for joint in ("hip", "knee", "ankle"))
        result[f"{name}_upper_arm"] = camera.limb(shoulder, elbow, m.upper_arm, 6.5)
        result[f"{name}_forearm"] = camera.limb(elbow, wrist, m.forearm, 7.0)
        result[f"{name}_hand"] = camera.end(elbow, wrist, 6.6)
        result[f"{name}_thigh"] = camera.limb(hip, knee, m.thigh, -0.5)
        result[f"{name}_shin"] = camera.limb(knee, ankle, m.shin, -1.5)
        result[f"{name}_foot"] = camera.end(knee, ankle, -2.0, share=0.35)

    yaw = np.radians(view.turn) + twist
    width = np.hypot(np.cos(yaw), _BODY_DEPTH * np.sin(yaw))
    hips = np.hypot(np.cos(np.radians(view.turn)), _BODY_DEPTH * np.sin(np.radians(view.turn)))
    result["torso"] = camera.limb(at["neck"], at["pelvis"], m.trunk, 3.0, width)
    result["pelvis"] = camera.upright(at["pelvis"], 0.3 * lean, 1.0, np.full(frames, hips))
    tilt = 0.6 * lean + np.radians(pose["head"][:, 0])
    result["head"] = camera.upright(at["head"], tilt, 5.0, np.ones(frames))
    return result


class _Camera:
    def __init__(self, view: View) -> None:
        self._view = view
        turn = np.radians(view.turn)
        self._cos, self._sin = np.cos(turn), np.sin(turn)

    def project(self, point: Array) -> tuple[Array, Array, Array]:
        """Points (N,3) to pixels (N,2), pixels per unit there (N,), and depth (N,)."""
        x = point[:, 0] * self._cos + point[:, 2] * self._sin
        z = -point[:, 0] * self._sin + point[:, 2] * self._cos
        y = point[:, 1] * np.cos(_PITCH) - z * np.sin(_PITCH)
        near = 1 + z / _PERSPECTIVE
        eye = 45.0
        v = self._view
        pixels = np.stack(
            [v.x + v.scale * x * near, v.y - v.scale * (eye + (y - eye) * near)], axis=1
        )
        return pixels, v.scale * near, z

    def limb(
        self, start: Array, end: Array, length: float, lift: float, width: Array | float = 1.0
    ) -> Placement:
        """A piece whose y axis runs from `start` to `end`, `length` units long at rest."""
        a, size_a, depth_a = self.project(start)
        b, size_b, depth_b = self.project(end)
        size = (size_a + size_b) / 2
        along = (b - a) / length
        stretch = np.linalg.norm(along, axis=1)
        direction = along / np.maximum(stretch, 1e-6)[:, None]
        longer = np.maximum(stretch, _SHORTEST * size)
        origin = a - direction * (longer - stretch)[:, None] * length / 2
        return Placement(
            _matrix(direction, size * width, longer), origin, (depth_a + depth_b) / 2 + lift
        )

    def end(self, start: Array, end: Array, lift: float, share: float = 1.0) -> Placement:
        """A piece at `end` that turns with the limb from `start`, or with a share of its angle."""
        a, _, _ = self.project(start)
        b, size, depth = self.project(end)
        direction = _unit(b - a)
        if share < 1:
            angle = share * np.arctan2(-direction[:, 0], direction[:, 1])
            direction = np.stack([-np.sin(angle), np.cos(angle)], 1)
        return Placement(_matrix(direction, size, size), b, depth + lift)

    def upright(self, point: Array, angle: Array, lift: float, width: Array) -> Placement:
        """A piece at `point`, tipped to image right by `angle` (radians)."""
        origin, size, depth = self.project(point)
        direction = np.stack([-np.sin(angle), np.cos(angle)], 1)
        return Placement(_matrix(direction, size * width, size), origin, depth + lift)


def _matrix(direction: Array, width: Array, length: Array) -> Array:
    """Columns: the piece's x axis (across) and y axis (along `direction`), in pixels."""
    across = np.stack([direction[:, 1], -direction[:, 0]], 1)
    return np.stack([across * width[:, None], direction * length[:, None]], 2)


def _bend(start: Array, target: Array, upper: float, lower: float, towards: Array):
    """Two-bone inverse kinematics: the joint, bent `towards` a direction, and the reached end."""
    reach = target - start
    distance = np.linalg.norm(reach, axis=1, keepdims=True)
    direction = reach / np.maximum(distance, 1e-6)
    distance = np.clip(distance, abs(upper - lower) + 0.5, (upper + lower) * 0.999)
    foot = (upper**2 - lower**2 + distance**2) / (2 * distance)
    height = np.sqrt(np.maximum(upper**2 - foot**2, 0))
    side = towards - direction * (direction @ towards)[:, None]
    joint = start + direction * foot + _unit(side) * height
    return joint, start + direction * distance


def _unit(vector: Array) -> Array:
    return vector / np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-9)
