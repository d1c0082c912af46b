"""Flow out of keypoints: exact on the bones, and honest about what no keypoint says."""

import pytest
import torch

from s2dm.data import DataConfig, build_dataset
from s2dm.data.puppets import render_clip
from s2dm.flow import FlowError, pose_flow
from s2dm.flow.pose import JOINTS

ARM = ("left_shoulder", "left_elbow", "left_wrist")


def keypoints(*frames: dict[str, tuple[float, float]]) -> torch.Tensor:
    """One person, (N,1,18,3); a frame's joints are those that it names."""
    found = torch.zeros(len(frames), 1, len(JOINTS), 3)
    for frame, joints in enumerate(frames):
        for name, place in joints.items():
            found[frame, 0, JOINTS.index(name)] = torch.tensor([*place, 1.0])
    return found


def at(flow, frame: int, x: int, y: int) -> list[float]:
    return flow.displacement[frame, :, y, x].tolist()


@pytest.mark.parametrize("action", [2, 9, 21, 24])
def test_on_the_bones_of_a_puppet_flow_is_exact(action):
    clip = render_clip(action % 24, action, 3, frames=6)
    flow = pose_flow(clip.pose, 128, 128)
    joints = {name: clip.pose[:, 0, number, :2] for number, name in enumerate(JOINTS)}
    errors = []
    for side in ("right", "left"):
        for start, end in (("shoulder", "elbow"), ("elbow", "wrist"), ("hip", "knee")):
            for share in (0.3, 0.5, 0.7):
                bone = joints[f"{side}_{start}"].lerp(joints[f"{side}_{end}"], share)
                for frame in range(1, 6):
                    x, y = bone[frame].round().long().clamp(0, 127).tolist()
                    seen = clip.flow.displacement[frame, :, y, x]
                    errors.append((flow.displacement[frame, :, y, x] - seen).norm())
    errors = torch.stack(errors)
    # Elsewhere another limb lies before this one in one of the two.
    assert errors.median() < 0.1
    assert (errors < 0.5).float().mean() > 0.75


@pytest.mark.parametrize("action", [2, 21, 24])
def test_it_moves_what_moves(action):
    clip = render_clip(action % 24, action, 3, frames=4)
    flow = pose_flow(clip.pose, 128, 128)
    moves, said = clip.flow.magnitude() > 0.5, flow.magnitude() > 0.5
    assert (moves & said).sum() > 0.65 * (moves | said).sum()
    error = (flow.displacement - clip.flow.displacement).norm(dim=1, keepdim=True)
    assert error[moves].mean() < 0.5 * clip.flow.magnitude()[moves].mean()


def test_a_limb_turns_and_stretches_with_its_bone():
    still = {"left_shoulder": (20.0, 20.0), "left_wrist": (20.0, 60.0)}
    flow = pose_flow(
        keypoints({**still, "left_elbow": (40.0, 20.0)}, {**still, "left_elbow": (20.0, 40.0)}),
        64, 64,
    )  # fmt: skip
    assert at(flow, 1, 20, 30) == pytest.approx([10, -10], abs=1e-4)  # half way along
    assert at(flow, 1, 50, 50) == [0, 0]
    longer = pose_flow(
        keypoints({**still, "left_elbow": (40.0, 20.0)}, {**still, "left_elbow": (60.0, 20.0)}),
        64, 64,
    )  # fmt: skip
    assert at(longer, 1, 50, 20) == pytest.approx([-15, 0], abs=1e-4)


def test_what_a_limb_uncovers_is_occluded():
    arm = dict(zip(ARM, ((10.0, 20.0), (10.0, 40.0), (10.0, 50.0)), strict=True))
    moved = dict(zip(ARM, ((40.0, 20.0), (40.0, 40.0), (40.0, 50.0)), strict=True))
    flow = pose_flow(keypoints(arm, moved, arm), 64, 64)
    assert at(flow, 1, 40, 30) == [-30, 0] and flow.occlusion[1, 0, 30, 40] == 0
    assert flow.occlusion[1, 0, 30, 10] == 1 and at(flow, 1, 10, 30) == [0, 0]
    assert not flow.displacement[2].any() and not flow.occlusion[2].any()


def test_what_comes_in_from_outside_is_occluded():
    arm = dict(zip(ARM, ((-20.0, 20.0), (-20.0, 40.0), (-20.0, 50.0)), strict=True))
    moved = dict(zip(ARM, ((20.0, 20.0), (20.0, 40.0), (20.0, 50.0)), strict=True))
    flow = pose_flow(keypoints(arm, moved), 64, 64)
    assert at(flow, 1, 20, 30) == [-40, 0] and flow.occlusion[1, 0, 30, 20] == 1


def test_a_joint_that_a_frame_lost_lies_between_those_that_have_it():
    arm = dict(zip(ARM, ((10.0, 20.0), (10.0, 40.0), (10.0, 50.0)), strict=True))
    moved = {name: (x + 20, y) for name, (x, y) in arm.items()}
    lost = {ARM[0]: (20.0, 20.0), ARM[2]: (20.0, 50.0)}
    whole = {**lost, ARM[1]: (20.0, 40.0)}
    flow = pose_flow(keypoints(arm, lost, moved), 64, 64)
    assert torch.equal(
        flow.displacement, pose_flow(keypoints(arm, whole, moved), 64, 64).displacement
    )
    # Of a joint that no frame has there is no limb.
    assert not pose_flow(keypoints(lost, moved | {ARM[1]: (0, 0)})[:1], 64, 64).magnitude().any()
    nobody = pose_flow(torch.zeros(3, 1, 18, 3), 16, 16)
    assert not nobody.displacement.any() and not nobody.occlusion.any()


def test_who_stands_further_back_is_hidden():
    arm = dict(zip(ARM, ((20.0, 20.0), (20.0, 40.0), (20.0, 50.0)), strict=True))
    moved = {name: (x + 5, y) for name, (x, y) in arm.items()}
    both = torch.cat([keypoints(arm, arm), keypoints(arm, moved)], dim=1)
    assert at(pose_flow(both, 64, 64), 1, 24, 30) == [-5, 0]
    assert at(pose_flow(both.flip(1), 64, 64), 1, 20, 30) == [0, 0]


def test_keypoints_of_another_kind_are_refused():
    with pytest.raises(FlowError, match=r"expected \(frames, people, 18, 3\), got \(2, 25, 3\)"):
        pose_flow(torch.zeros(2, 25, 3), 8, 8)
    with pytest.raises(FlowError, match="finite"):
        pose_flow(torch.full((1, 1, 18, 3), float("nan")), 8, 8)


def test_training_clips_may_have_pose_in_place_of_flow():
    data = DataConfig(size=64, frames=3, options={"condition": "pose"})
    clip, exact = build_dataset(data)[4], build_dataset(DataConfig(size=64, frames=3))[4]
    assert torch.equal(clip.frames, exact.frames) and torch.equal(clip.pose, exact.pose)
    assert torch.equal(clip.flow.displacement, pose_flow(clip.pose, 64, 64).displacement)
    with pytest.raises(ValueError, match="flow, pose as condition, got 'depth'"):
        build_dataset(DataConfig(options={"condition": "depth"}))
