"""Keypoints as OpenPose and the tools after it write them."""

import json

import pytest
import torch

from s2dm.flow import FlowError, pose_flow
from s2dm.flow.openpose import poses, read_openpose
from s2dm.flow.pose import JOINTS

NECK, WRIST, MID_HIP_25 = JOINTS.index("neck"), JOINTS.index("right_wrist"), 8


def body(x: float, y: float, size: float = 40.0, confidence: float = 0.9) -> list[float]:
    """18 keypoints of somebody whose neck is at (x, y)."""
    return [
        value
        for number in range(18)
        for value in (x + size * (number % 3 - 1), y + size * (number // 6), confidence)
    ]


def frame(*people: list[float], **canvas: int) -> dict:
    return {"version": 1.3, "people": [{"pose_keypoints_2d": person} for person in people]} | canvas


CANVAS = {"canvas_width": 128, "canvas_height": 96}


def test_pixels_of_the_canvas_stay():
    found = poses([frame(body(50, 20), **CANVAS)] * 2)
    assert found.keypoints.shape == (2, 1, 18, 3) and (found.width, found.height) == (128, 96)
    assert found.keypoints[1, 0, NECK].tolist() == pytest.approx([50, 20, 0.9])


def test_another_size_scales_them():
    found = poses([frame(body(50, 20), **CANVAS)], width=256, height=48)
    assert found.keypoints[0, 0, NECK, :2].tolist() == pytest.approx([100.5, 9.75])


def test_parts_of_the_canvas_are_told_from_pixels():
    """As comfyui_controlnet_aux writes them; feet may lie below the picture."""
    parts = [value / (128, 96, 1)[number % 3] for number, value in enumerate(body(50.5, 20.5))]
    found = poses([frame(parts, **CANVAS)])
    assert torch.allclose(found.keypoints, poses([frame(body(50, 20), **CANVAS)]).keypoints)


def test_files_of_openpose(tmp_path):
    for number in range(11):
        path = tmp_path / f"clip_{number:012}_keypoints.json"
        path.write_text(json.dumps(frame(body(50 + number, 20))), "utf-8")
    (tmp_path / "clip.json").write_text("{", "utf-8")
    frames = read_openpose(tmp_path)
    found = poses(frames, width=128, height=96)
    assert found.keypoints[:, 0, NECK, 0].tolist() == list(range(50, 61))
    with pytest.raises(FlowError, match=r"don't say of how large a picture.*Set width and height"):
        poses(frames)
    one = tmp_path / "saved.json"
    one.write_text(json.dumps([frame(body(50, 20), **CANVAS)] * 3), "utf-8")
    assert len(read_openpose(one)) == 3


def test_of_25_keypoints_18_count():
    eighteen = torch.tensor(body(50, 20)).view(18, 3)
    full = torch.zeros(25, 3)
    full[:8], full[9:19] = eighteen[:8], eighteen[8:]
    full[MID_HIP_25] = full[19:] = torch.tensor([1.0, 2.0, 1.0])
    found = poses([frame(full.flatten().tolist(), **CANVAS)])
    assert torch.equal(found.keypoints[0, 0], eighteen)


def test_what_is_uncertain_is_not_found():
    person = body(50, 20)
    person[3 * WRIST + 2] = 0.2
    assert poses([frame(person, **CANVAS)]).keypoints[0, 0, WRIST, 2] == 0
    trusting = poses([frame(person, **CANVAS)], least_confidence=0.1)
    assert trusting.keypoints[0, 0, WRIST, 2] > 0


def test_people_are_followed_by_where_they_are():
    """OpenPose's order means nothing, and it loses people."""
    clip = [
        frame(body(90, 20, 20), body(30, 20), **CANVAS),
        frame(body(33, 20), body(88, 20, 20), **CANVAS),
        frame(body(86, 20, 20), **CANVAS),
        frame(body(84, 20, 20), body(60, 60, 5), body(39, 20), **CANVAS),
    ]
    largest = poses(clip).keypoints
    assert largest[:, 0, NECK, 0].tolist() == [30, 33, 0, 39]
    everybody = poses(clip, people="all").keypoints
    assert everybody.shape[1] == 2  # who comes later isn't in frame 1
    assert everybody[:, 0, NECK, 0].tolist() == [90, 88, 86, 84]  # the smaller one further back
    assert torch.equal(everybody[:, 1:], largest)
    assert len(pose_flow(everybody, 96, 128)) == 4


def test_frames_in_which_nobody_is_found_lie_between_those_that_have_somebody():
    """However many in a row, also the last: where nobody is known, who was there is kept."""
    empty = [frame(**CANVAS), frame(**CANVAS)]
    clip = [frame(body(50, 20), **CANVAS), *empty, frame(body(56, 20), **CANVAS), *empty]
    found = poses(clip).keypoints
    assert found[:, 0, NECK, 0].tolist() == [50, 0, 0, 56, 0, 0]
    assert (found[[1, 2, 4, 5], 0, :, 2] == 0).all()
    flow = pose_flow(found, 96, 128)
    x, y = 50, int(found[0, 0, NECK, 1]) + 4  # on the trunk
    moved = [round(-flow.displacement[k, 0, y, x].item()) for k in range(6)]
    assert moved == [0, 2, 4, 6, 6, 6]


def test_a_face_alone_is_nobody():
    clip = frame(body(50, 20), **CANVAS)
    clip["people"] += [{"pose_keypoints_2d": None}, {"face_keypoints_2d": [1, 2, 3]}]
    assert poses([clip], people="all").keypoints.shape[1] == 1


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "expected a list of frames with people, got an empty list"),
        ("person", "expected a list of frames with people, got a str"),
        ([{"persons": []}], "frame 1: expected a list of people"),
        ([{"people": 3}], "frame 1: expected a list of people, got int. Give"),
        ([frame(body(1, 1)[:-1], **CANVAS)], "frame 1: expected x, y and confidence of 18 or 25"),
        ([frame([0.5] * 51, **CANVAS)], "of 18 or 25 keypoints of a body, got 51 values"),
        ([frame(["a"] * 54, **CANVAS)], "of 18 or 25"),
        ([frame([float("nan")] * 54, **CANVAS)], "frame 1: expected finite"),
        ([frame(**CANVAS)], "expected at least one person in frame 1"),
        ([frame(body(9, 9, confidence=0.1), **CANVAS)], "confidence 0.3 or more"),
        ([frame(body(9, 9), canvas_width=0, canvas_height=8)], "canvas of at least one pixel"),
    ],
)
def test_what_is_wrong_is_named(frames, message):
    with pytest.raises(FlowError, match=message):
        poses(frames)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FlowError, match=r"expected files \*_keypoints.json"):
        read_openpose(tmp_path)
    with pytest.raises(FlowError, match="expected a file of keypoints"):
        read_openpose(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("wave", "utf-8")
    with pytest.raises(FlowError, match="expected JSON"):
        read_openpose(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"nodes": []}', "utf-8")
    with pytest.raises(FlowError, match="expected frames with people"):
        read_openpose(tmp_path / "b.json")
    with pytest.raises(FlowError, match="people: expected one of largest, all"):
        poses([], people="first")
