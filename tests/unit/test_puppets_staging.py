"""Puppets elsewhere, at other sizes, before a camera that moves: the flow stays exact."""

import numpy as np
import pytest
import torch

from s2dm.data.puppets import PuppetClips, render_clip
from s2dm.data.puppets.staging import USUAL, Staging, draw_staging

PLACED = Staging(place=(-20, 3), size=0.65)
FILMED = Staging(place=(9, -4), size=1.05, pan=(-17, 2.5), zoom=1.04)


def _error(clip, flow):
    """Of 255: how far frame 1, taken along by the flow, is from each frame, where it is seen."""
    near = torch.nn.functional.max_pool2d(clip.flow.occlusion, 3, stride=1, padding=1)
    error = (flow - clip.frames).abs().mean(1, keepdim=True) * 255
    return error[1:][near[1:] == 0].mean()


@pytest.mark.parametrize("staging", [PLACED, FILMED], ids=["placed", "filmed"])
@pytest.mark.parametrize("action", [2, 21, 24])
def test_flow_carries_frame_1_onto_every_frame(staging, action):
    clip = render_clip(action % 24, action, 3, frames=4, staging=staging)
    carried = _error(clip, clip.flow.warp(clip.frames[:1]))
    assert carried < 2
    assert carried < 0.5 * _error(clip, clip.frames[:1])
    assert clip.elsewhere


def test_the_room_moves_as_the_camera_does():
    staging = Staging(pan=(12, -2))
    clip = render_clip(0, 2, 0, frames=5, staging=staging)
    corner = clip.flow.displacement[:, :, 3, 3]
    expected = torch.linspace(0, 1, 5)[:, None] * torch.tensor([-12.0, 2.0])
    assert torch.allclose(corner, expected, atol=1e-4)
    # What the camera turns to was not in frame 1.
    assert (clip.flow.occlusion[-1, 0, 10:, :11] == 1).all()
    assert (clip.flow.occlusion[-1, 0, 10:60, 14:20] == 0).all()
    assert not clip.still.any()


def test_zoom_is_about_the_middle():
    clip = render_clip(0, 2, 0, frames=3, staging=Staging(zoom=1.03))
    moved = clip.flow.displacement[-1]
    assert moved[0, 5, 0] == pytest.approx(63.5 * (1 - 1 / 1.03), abs=1e-3)
    assert moved[0, 5, 127] == pytest.approx(-moved[0, 5, 0].item(), abs=1e-3)


def test_who_stands_still_is_filmed_as_the_room_is():
    clip = render_clip(5, 2, 0, frames=3, amplitude=0.0, staging=FILMED)
    ways = [FILMED.camera(128, 3).backward(frame) for frame in range(3)]
    rows, columns = np.mgrid[:128, :128]
    pixels = np.stack([columns, rows, np.ones_like(rows)])
    expected = np.einsum("fij,jhw->fihw", np.stack(ways), pixels)
    assert np.abs(clip.flow.displacement.numpy() - expected).max() < 1e-3


def test_the_person_stands_where_the_staging_says():
    def columns(**staging):
        clip = render_clip(3, 2, 0, frames=2, staging=Staging(**staging))
        return clip.garments[0].mask.nonzero().float()

    usual, right, small = columns(), columns(place=(20, 0)), columns(size=0.6)
    assert right[:, 1].mean() - usual[:, 1].mean() == pytest.approx(20, abs=0.5)
    assert len(small) / len(usual) == pytest.approx(0.36, rel=0.05)


def test_the_usual_staging_changes_no_bit():
    usual, again = render_clip(4, 7, 2, frames=3), PuppetClips("train", takes=1, frames=3)
    staged = render_clip(4, 7, 2, frames=3, staging=Staging())
    assert torch.equal(usual.frames, staged.frames)
    assert torch.equal(usual.flow.displacement, staged.flow.displacement)
    assert not usual.elsewhere
    assert not any(again[index].elsewhere for index in (0, 99))


@pytest.mark.parametrize(("size", "frames"), [(96, 2), (200, 2), (77, 3), (128, 1)])
def test_any_size_and_number_of_frames(size, frames):
    clip = render_clip(0, 24, 1, size=size, frames=frames, staging=FILMED)
    assert clip.frames.shape == (frames, 3, size, size)
    assert clip.flow.displacement.shape == (frames, 2, size, size)


def test_draws_are_within_what_a_camera_may_do_and_half_of_them_pan():
    rng = np.random.default_rng(0)
    drawn = [draw_staging(rng) for _ in range(200)]
    pans = sum(staging.pan != USUAL.pan for staging in drawn)
    assert 80 < pans < 120
    assert USUAL not in drawn


@pytest.mark.parametrize(
    "staging", [{"size": 0.0}, {"pan": (19, 0)}, {"pan": (0, 4)}, {"zoom": 1.1}]
)
def test_a_staging_out_of_range_is_refused(staging):
    with pytest.raises(ValueError, match="Expected"):
        Staging(**staging)


def test_a_share_of_the_clips_is_elsewhere():
    clips = PuppetClips("train", takes=1, size=16, frames=1, elsewhere=0.5)
    share = np.mean([clips[index].elsewhere for index in range(0, len(clips), 20)])
    assert 0.25 < share < 0.75
    usual = PuppetClips("train", takes=1, size=16, frames=1)
    same = next(index for index in range(40) if not clips[index].elsewhere)
    assert torch.equal(clips[same].frames, usual[same].frames)
    with pytest.raises(ValueError, match="Expected shares"):
        PuppetClips("train", elsewhere=1.5)
