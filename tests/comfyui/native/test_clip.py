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


def sound(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda path: path.write_bytes(b""), "Invalid data"),
        (lambda path: path.write_text("hello"), "Invalid data"),
        (lambda path: None, "No such file"),
        (sound, "[Nn]o video stream"),
    ],
)
def test_a_video_that_cannot_be_read_is_named_with_a_remedy(rig, tmp_path, make, got):
    """Whoever reads it: core's own words say neither."""
    from comfy_api.latest import InputImpl

    make(tmp_path / "clip.mkv")
    broken = InputImpl.VideoFromFile(str(tmp_path / "clip.mkv"))
    told = rf": video: expected a video that can be read, got: .*{got}.*plays elsewhere"
    for node, inputs in (("S2DMFitClip", {}), ("S2DMEstimateFlow", {"method": "dis"})):
        with pytest.raises(ValueError, match=rf"^\w+ \w+ \(S2DM\){told}"):
            rig.run(node, video=broken, **inputs)
    with pytest.raises(ValueError, match=r"^Fit Clip \(S2DM\): video: expected a video, got str"):
        rig.run("S2DMFitClip", video="clip.mp4")


def test_a_video_without_frames_is_named(rig):
    clip, _ = video(frames=0)
    with pytest.raises(ValueError, match=r"^Fit Clip \(S2DM\): video: expected at least one frame"):
        rig.run("S2DMFitClip", video=clip)
