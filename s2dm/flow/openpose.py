"""Keypoints in OpenPose's format: from its files, and from tools that follow it.

OpenPose writes a file a frame, `NAME_000000000000_keypoints.json`, with the people that it found;
their numbers belong to nobody, so people are told apart by where they are. In ComfyUI the sockets
POSE_KEYPOINT carry a list of the same with the size of the picture, some with coordinates in
pixels, some in parts of the picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import read_text
from .field import FlowError
from .pose import JOINTS

PEOPLE = ("largest", "all")
SUFFIX = "_keypoints.json"

# Which of OpenPose's 25 keypoints are the 18: without the middle of the hips, and the feet.
_OF_25 = [*range(8), *range(9, 19)]
_MOST_PEOPLE = 100
_FAR = 0.5  # in sizes of a person: nobody moves further from one frame to the next


class Poses(NamedTuple):
    """keypoints: (N,P,18,3) as `pose_flow` takes them, in pixels of height x width."""

    keypoints: Tensor
    height: int
    width: int


def read_openpose(path: str | Path) -> list[dict[str, Any]]:
    """The frames of a folder of OpenPose's files, in the order of their names, or of one file.

    One file holds a frame or a list of them.

    Raises:
        FlowError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_dir():
        return _frames(path)
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise FlowError(f"{path}: expected files *{SUFFIX}, as OpenPose writes them, got none.")
    return [frame for file in files for frame in _frames(file)]


def poses(
    frames: Any,
    width: int = 0,
    height: int = 0,
    people: str = "largest",
    least_confidence: float = 0.3,
) -> Poses:
    """The people of a clip, in pixels of width x height.

    frames: a list of one dictionary a frame: `people`, a list of dictionaries with
        `pose_keypoints_2d`, x, y and confidence of 18 or 25 keypoints in one list; and, where the
        source knows them, `canvas_width` and `canvas_height`. Coordinates that lie between -1 and 2
        are parts of the canvas, others pixels of it.
    width, height: 0 for the canvas. Where there is no canvas, coordinates are pixels of this size.
    people: "largest", who is largest in frame 1, or "all" who are in frame 1. They are followed by
        where they are. Who comes later isn't known in frame 1, which flow is measured from.
    least_confidence: keypoints with less are as good as not found.

    Raises:
        FlowError: something else than such frames, no size, or nobody in frame 1.
    """
    if people not in PEOPLE:
        raise FlowError(f"people: expected one of {', '.join(PEOPLE)}, got {people!r}.")
    frames = [frames] if isinstance(frames, dict) else frames
    if not isinstance(frames, (list, tuple)) or not frames:
        got = "an empty list" if frames in ([], ()) else f"a {type(frames).__name__}"
        raise FlowError(f"expected a list of frames with people, got {got}.")
    found = [_people(frame, index) for index, frame in enumerate(frames)]
    canvas = _canvas(frames[0])
    width, height = width or canvas[0], height or canvas[1]
    if not (width and height):
        raise FlowError(
            "expected a size: these keypoints don't say of how large a picture they are. Set width "
            "and height."
        )
    people_found = [person for one in found for person in one]
    parts = _are_parts(people_found)
    size = torch.tensor([width, height], dtype=torch.float64)
    pixels = torch.tensor([canvas[0] or width, canvas[1] or height], dtype=torch.float64)
    for person in people_found:
        place = person[:, :2] if parts else (person[:, :2] + 0.5) / pixels
        person[:, :2] = place * size - 0.5
        person[:, 2] *= person[:, 2] >= max(least_confidence, 1e-6)
    found = [[person for person in one if (person[:, 2] > 0).any()] for one in found]
    if not found[0]:
        raise FlowError(
            f"expected at least one person in frame 1, from which flow is measured, got none with "
            f"a keypoint of confidence {least_confidence:g} or more."
        )
    # All of them are followed, so that nobody is taken for who has left.
    everybody = _followed(sorted(found[0], key=_size), found)
    return Poses(everybody[:, -1:] if people == "largest" else everybody, height, width)


def _frames(path: Path) -> list[dict[str, Any]]:
    try:
        values = json.loads(read_text(path))
    except OSError as error:
        raise FlowError(f"{path}: expected a file of keypoints ({error}).") from error
    except ValueError as error:
        raise FlowError(f"{path}: expected JSON, got something else ({error}).") from error
    values = values if isinstance(values, list) else [values]
    if not all(isinstance(value, dict) and "people" in value for value in values):
        raise FlowError(f"{path}: expected frames with people, as OpenPose writes them.")
    return values


def _people(frame: Any, index: int) -> list[Tensor]:
    """The people of a frame, (18,3) each."""
    where = f"frame {index + 1}"
    people = frame.get("people") if isinstance(frame, dict) else None
    if not isinstance(people, (list, tuple)):
        got = type(frame if people is None else people).__name__
        raise FlowError(
            f"{where}: expected a list of people, got {got}. Give what OpenPose, DWPose or SDPose "
            "found, one entry a frame."
        )
    found = []
    for person in people[:_MOST_PEOPLE]:
        numbers = person.get("pose_keypoints_2d") if isinstance(person, dict) else None
        if numbers is None or len(numbers) == 0:
            continue  # a face or a hand alone
        try:
            keypoints = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 3)
        except (TypeError, ValueError, RuntimeError):
            keypoints = torch.zeros(0, 3)
        if len(keypoints) not in (len(JOINTS), 25):
            raise FlowError(
                f"{where}: expected x, y and confidence of {len(JOINTS)} or 25 keypoints of a "
                f"body, got {len(numbers)} values."
            )
        if not torch.isfinite(keypoints).all():
            raise FlowError(f"{where}: expected finite keypoints, got NaN or infinity.")
        found.append(keypoints[_OF_25] if len(keypoints) == 25 else keypoints)
    return found


def _canvas(frame: dict[str, Any]) -> tuple[int, int]:
    """Width and height of the picture, zeros where the frame doesn't say."""
    sides = [frame.get(f"canvas_{side}") for side in ("width", "height")]
    if sides == [None, None]:
        return 0, 0
    width, height = (side if isinstance(side, (int, float)) else 0 for side in sides)
    if not (width >= 1 and height >= 1):
        raise FlowError(f"expected a canvas of at least one pixel, got {sides[0]} x {sides[1]}.")
    return int(width), int(height)


def _are_parts(people: Sequence[Tensor]) -> bool:
    """Whether coordinates are parts of the picture: nobody is three pixels large."""
    known = [person[person[:, 2] > 0, :2] for person in people]
    return all(bool(((place >= -1) & (place <= 2)).all()) for place in known)


def _size(person: Tensor) -> float:
    known = person[person[:, 2] > 0, :2]
    return float((known.amax(0) - known.amin(0)).norm())


def _followed(first: Sequence[Tensor], frames: Sequence[Sequence[Tensor]]) -> Tensor:
    """(N,P,18,3): the people of frame 1 through all frames; zeros where one isn't found."""
    paths = torch.zeros(len(frames), len(first), *first[0].shape, dtype=torch.float64)
    last = list(first)
    for index, found in enumerate(frames):
        pairs = sorted(
            (distance, number, other)
            for number, person in enumerate(last)
            for other, candidate in enumerate(found)
            if (distance := _distance(person, candidate)) <= _FAR * _size(person)
        )
        taken: set[int] = set()
        placed: set[int] = set()
        for _, number, other in pairs:
            if number not in placed and other not in taken:
                placed.add(number)
                taken.add(other)
                paths[index, number] = last[number] = found[other]
    return paths.float()


def _distance(person: Tensor, other: Tensor) -> float:
    """Between two people, a mean over the joints that both have."""
    both = (person[:, 2] > 0) & (other[:, 2] > 0)
    if not both.any():
        return float("inf")
    return float((person[both, :2] - other[both, :2]).norm(dim=1).mean())
