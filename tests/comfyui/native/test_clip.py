"""Fit Clip: frames of a video in the number and the size that a model knows."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

pytestmark = pytest.mark.comfyui


def video(frames=4, height=10, width=14, fps="30000/1001"):
    from comfy_api.latest import InputImpl, Types

    images = torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(0))
    components = Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(fps))
    return InputImpl.VideoFromComponents(components), images


def test_frames_size_and_rate(rig):
    clip, images = video(frames=6, height=64, width=64)
    frames, fps = rig.run("S2DMFitClip", video=clip, frames=3, first_frame=3, width=64, height=64)
    assert fps == pytest.approx(29.97, abs=1e-3)
    assert frames.shape == (3, 64, 64, 3)
    # Of the same size, nothing but the eight bits of a picture is lost.
    assert (frames - images[2:5]).abs().max() < 1 / 255 + 1e-6


def test_the_centre_is_kept_in_shape(rig):
    """100 x 140: a grey clip with a white square in the middle, which stays one."""
    from comfy_api.latest import InputImpl, Types

    images = torch.zeros(2, 140, 100, 4)
    images[:, 50:90, 30:70, :3] = 1
    components = Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(8))
    frames, _ = rig.run("S2DMFitClip", video=InputImpl.VideoFromComponents(components))
    assert frames.shape == (2, 128, 128, 3)
    white = frames[0, :, :, 0] > 0.5
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    assert (rows.min(), rows.max()) == (columns.min(), columns.max())
    assert rows.min() == 127 - rows.max()


def test_sides_are_multiples_of_eight_by_construction(node_classes):
    """So that the autoencoder and the video's encoder, which wants even sides, take them."""
    inputs = {socket.id: socket for socket in node_classes["S2DMFitClip"].GET_SCHEMA().inputs}
    for side in (inputs["width"], inputs["height"]):
        assert side.step == 8 and side.min % 8 == 0 and side.default % 8 == 0


def test_a_beginning_behind_the_end_is_refused(rig):
    clip, _ = video(frames=4)
    with pytest.raises(ValueError, match=r"^Fit Clip \(S2DM\): .* at most 4, .* got 5\. Begin"):
        rig.run("S2DMFitClip", video=clip, first_frame=5)
