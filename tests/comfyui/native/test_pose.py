"""Pose to Flow in a real ComfyUI: sockets of pose estimators, and files."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.comfyui

# In OpenPose's order: nose, neck, right arm, left arm, right leg, left leg.
STANDING = (
    (64, 14), (64, 28), (54, 30), (48, 46), (46, 60), (74, 30), (80, 46), (82, 60),
    (58, 66), (57, 88), (56, 110), (70, 66), (71, 88), (72, 110),
)  # fmt: skip


def frame(shift: float, **person: float) -> dict:
    numbers = [value for x, y in STANDING for value in (x + shift, y, 1.0)] + [0.0] * 12
    return {
        "people": [{"pose_keypoints_2d": numbers, "face_keypoints_2d": None, **person}],
        "canvas_width": 128,
        "canvas_height": 128,
    }


CLIP = [frame(0), frame(4), frame(8)]


def test_a_person_goes_to_the_right(rig):
    (flow,) = rig.run("S2DMPoseToFlow", keypoints=CLIP)
    assert (len(flow), flow.width, flow.height) == (3, 128, 128)
    assert flow.displacement[2, :, 45, 72].tolist() == pytest.approx([-8, 0], abs=1e-4)
    assert not flow.displacement[2, :, 10, 10].any()
    (half,) = rig.run("S2DMPoseToFlow", keypoints=CLIP, width=64, height=64)
    assert half.displacement[2, :, 22, 36].tolist() == pytest.approx([-4, 0], abs=1e-4)


def test_files_of_the_input_folder(rig, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    folder = tmp_path / "walk"
    folder.mkdir()
    for number, one in enumerate(CLIP):
        (folder / f"walk_{number:012}_keypoints.json").write_text(json.dumps(one), "utf-8")
    (tmp_path / "saved.json").write_text(json.dumps(CLIP), "utf-8")
    file = rig.nodes["S2DMPoseToFlow"].define_schema().inputs[0]
    assert [entry for entry in file.options if "[output]" not in entry] == [
        "none", "saved.json", "walk",
    ]  # fmt: skip
    (expected,) = rig.run("S2DMPoseToFlow", keypoints=CLIP)
    for name in ("saved.json", "walk"):
        (flow,) = rig.run("S2DMPoseToFlow", file=name)
        assert (flow.displacement == expected.displacement).all()
    mark = rig.nodes["S2DMPoseToFlow"].fingerprint_inputs(file="walk")
    (folder / "walk_000000000003_keypoints.json").write_text(json.dumps(frame(9)), "utf-8")
    assert rig.nodes["S2DMPoseToFlow"].fingerprint_inputs(file="walk") != mark


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "expected keypoints from a socket or a file, got neither"),
        ({"keypoints": CLIP, "file": "saved.json"}, "got both"),
        ({"keypoints": []}, "got an empty list"),
        ({"keypoints": [{"people": []}]}, "don't say of how large a picture"),
        ({"keypoints": [{**frame(0), "people": []}]}, "at least one person in frame 1"),
        ({"keypoints": [[1, 2]]}, "frame 1: expected a list of people"),
        ({"file": "../secret.json"}, "expected keypoints in the folder"),
        ({"keypoints": CLIP, "width": 8192, "height": 8192 * 1024}, "fits into"),
    ],
)
def test_what_is_wrong_is_named(rig, inputs, message):
    with pytest.raises(ValueError, match=rf"^Pose to Flow \(S2DM\): .*{message}"):
        rig.run("S2DMPoseToFlow", **inputs)


def test_keypoints_of_core(rig):
    """Core's SDPose, where there is one: 133 keypoints of COCO become OpenPose's."""
    core = pytest.importorskip("comfy_extras.nodes_sdpose")
    order = [0, 0, 0, 0, 0, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]
    clip = [[[(x + shift, y) for x, y in STANDING] for _ in range(1)] for shift in (0, 4, 8)]
    found = [
        [[one[joint] for joint in order] + [one[0]] * 116 for one in people] for people in clip
    ]
    frames = core._to_openpose_frames(found, [[[0.9] * 133]] * 3, 128, 128)
    (flow,) = rig.run("S2DMPoseToFlow", keypoints=frames)
    assert flow.displacement[2, :, 45, 72].tolist() == pytest.approx([-8, 0], abs=1e-4)
