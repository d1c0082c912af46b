"""Keypoints of people as flow: a skeleton says where each limb was in frame 1.

The keypoints are the 18 of OpenPose's body (COCO with a neck). A limb is a strip around the bone
between two of them. It moves as its bone does, so flow on a bone is that of the bone, exactly; how
thick limbs are, and that arms pass before the trunk, no keypoint says: that is guessed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .field import FlowError, FlowField
from .geometry import pixel_grid

_SIDES = ("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")
JOINTS = (
    "nose",
    "neck",
    *(f"{side}_{joint}" for limb in _SIDES for side in ("right", "left") for joint in limb),
    "right_eye",
    "left_eye",
    "right_ear",
    "left_ear",
)
"""Names of the 18 keypoints, in OpenPose's order. Right is the person's own right."""

_HIPS = len(JOINTS)  # one more: the middle between the hips


class _Limb(NamedTuple):
    start: int
    end: int
    radius: float  # in lengths of the trunk
    reach: float = 1.0  # how far it goes along the bone: a hand goes on behind the wrist
    round: bool = True


def _pair(first: str, second: str, radius: float, reach: float = 1.0) -> list[_Limb]:
    return [
        _Limb(JOINTS.index(f"{side}_{first}"), JOINTS.index(f"{side}_{second}"), radius, reach)
        for side in ("right", "left")
    ]


_LIMBS = (  # from the back to the front
    *_pair("hip", "knee", 0.18),
    *_pair("knee", "ankle", 0.15, 1.2),
    _Limb(JOINTS.index("neck"), _HIPS, 0.36, round=False),
    _Limb(JOINTS.index("neck"), JOINTS.index("nose"), 0.3, 1.1),
    *_pair("shoulder", "elbow", 0.15),
    *_pair("elbow", "wrist", 0.13, 1.35),
)


def pose_flow(keypoints: Tensor, height: int, width: int) -> FlowField:
    """The flow of people whose keypoints are known; everything else stands still.

    keypoints: (N,P,18,3): of N frames and P people, those further back first, x and y in pixels of
        height x width, and a confidence, which is 0 for what wasn't found. In a frame without it a
        joint is where a straight line in time puts it; before it is first found, and after it is
        last found, it stays. Limbs with a joint that no frame has are left out.

    Occluded is what a limb uncovers, and of a limb what another one hid in frame 1, or what comes
    in from outside the picture.

    Raises:
        FlowError: keypoints of another shape, or not finite.
    """
    if keypoints.ndim != 4 or keypoints.shape[2:] != (len(JOINTS), 3) or not len(keypoints):
        raise FlowError(
            f"keypoints: expected (frames, people, {len(JOINTS)}, 3), got {tuple(keypoints.shape)}."
        )
    if not torch.isfinite(keypoints).all():
        raise FlowError("keypoints: expected finite numbers, got NaN or infinity.")
    bones = [bone for person in keypoints.double().unbind(1) for bone in _bones(person)]
    grid = pixel_grid(height, width, torch.zeros((), dtype=torch.float64))
    flow = FlowField.zeros(len(keypoints), height, width)
    first, _ = _lay(bones, 0, grid)
    for frame in range(1, len(flow)):
        owner, source = _lay(bones, frame, grid)
        flow.displacement[frame] = (source - grid).float()
        flow.occlusion[frame, 0] = (~_shown(first, owner, source)).float()
    return flow


class _Bone(NamedTuple):
    """Where a limb begins and ends in each frame, both (N,2) pixels, and its half width."""

    start: Tensor
    end: Tensor
    radius: float
    round: bool


def _bones(person: Tensor) -> list[_Bone]:
    """The limbs of a person (N,18,3) that can be drawn."""
    joints, known = _filled(person)
    unit = _trunk(joints[0], known)
    bones = []
    for limb in _LIMBS:
        if known[limb.start] and known[limb.end]:
            start, end = joints[:, limb.start], joints[:, limb.end]
            end = start + limb.reach * (end - start)
            bones.append(_Bone(start, end, max(limb.radius * unit, 0.5), limb.round))
    return bones


def _filled(person: Tensor) -> tuple[Tensor, list[bool]]:
    """(N,19,2) joints in every frame, and which of the 19 any frame has."""
    frames = np.arange(len(person))
    joints, found = person[..., :2].clone(), person[..., 2] > 0
    for joint, seen in enumerate(found.T):
        if seen.any() and not seen.all():
            for axis in (0, 1):
                path, known_at = joints[:, joint, axis].numpy(), seen.numpy()
                path[:] = np.interp(frames, frames[known_at], path[known_at])
    known: list[bool] = found.any(0).tolist()
    both = [JOINTS.index("right_hip"), JOINTS.index("left_hip")]
    hips = [joint for joint in both if known[joint]]
    middle = joints[:, hips or both].mean(1, keepdim=True)
    return torch.cat([joints, middle], 1), [*known, bool(hips)]


def _trunk(joints: Tensor, known: list[bool]) -> float:
    """Length of the trunk in pixels, or what it may be, from the joints (19,2) of frame 1."""
    lengths = [
        factor * float((joints[one] - joints[other]).norm())
        for one, other, factor in (
            (JOINTS.index("neck"), _HIPS, 1.0),
            # Seen from the front, shoulders are about four fifths as far apart.
            (JOINTS.index("right_shoulder"), JOINTS.index("left_shoulder"), 1.25),
        )
        if known[one] and known[other]
    ]
    if not lengths:  # of somebody of whom little is seen
        shown = joints[torch.tensor(known)]
        lengths = [float((shown.amax(0) - shown.amin(0)).max()) / 2] if len(shown) else [0.0]
    return max(lengths)


def _lay(bones: list[_Bone], frame: int, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Which limb each pixel belongs to, (H,W), 0 for none; where it was in frame 1, (2,H,W)."""
    height, width = grid.shape[1:]
    owner, source = torch.zeros(height, width, dtype=torch.long), grid.clone()
    for number, bone in enumerate(bones, start=1):
        ends = torch.stack([bone.start[frame], bone.end[frame]])
        corners = torch.stack([ends.amin(0) - bone.radius, ends.amax(0) + bone.radius + 2])
        corners = corners.clamp(min=torch.zeros(2), max=torch.tensor([width, height])).long()
        (left, top), (right, bottom) = corners.tolist()
        box = slice(top, bottom), slice(left, right)
        inside, where = _before(bone, frame, grid[:, box[0], box[1]])
        owner[box][inside] = number
        source[:, box[0], box[1]][:, inside] = where[:, inside]
    return owner, source


def _before(bone: _Bone, frame: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the pixels (2,h,w) a limb covers in `frame`, and where they were in frame 1.

    Along the bone it stretches with it, across and beyond its ends it only turns.
    """
    start, end = bone.start[frame], bone.end[frame]
    first, last = bone.start[0], bone.end[0]
    length, before = (end - start).norm(), (last - first).norm()
    # A bone that points at the viewer has no direction on the picture: then nothing turns.
    turns = min(length, before) >= 1
    way = (end - start) / length if turns else start.new_tensor([0.0, 1.0])
    way_before = (last - first) / before if turns else way
    offset = pixels - start.view(2, 1, 1)
    along = (offset * way.view(2, 1, 1)).sum(0)
    across = offset[1] * way[0] - offset[0] * way[1]
    share = (along / length.clamp(min=1)).clamp(0, 1)
    beyond = along - share * length
    if bone.round:
        inside = beyond.square() + across.square() <= bone.radius**2
    else:
        inside = (beyond.abs() <= 0.5) & (across.abs() <= bone.radius)
    side = torch.stack([-way_before[1], way_before[0]])
    where = (
        first.view(2, 1, 1)
        + share * (last - first).view(2, 1, 1)
        + beyond * way_before.view(2, 1, 1)
        + across * side.view(2, 1, 1)
    )
    return inside, where


def _shown(first: Tensor, owner: Tensor, source: Tensor) -> Tensor:
    """Whether frame 1, whose pixels belong to `first` (H,W), shows the pixels of a frame, (H,W)."""
    height, width = first.shape
    x, y = source
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    seen = torch.zeros_like(inside)
    for column in (x.floor(), x.ceil()):
        for row in (y.floor(), y.ceil()):
            near = first[row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)]
            seen |= near == owner
    return inside & seen
