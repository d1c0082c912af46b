"""Core's context windows over frames: they change nothing where they work, else they are refused.

They work from 0.33.0 on, the first that was tried; 0.3.75 and older don't cut conditions to them.
"""

from __future__ import annotations

import pytest
from core_nodes import windowed

pytestmark = pytest.mark.comfyui

FRAMES = 7


@pytest.fixture(scope="module")
def encoded(rig):
    return rig.encode(rig.flow(FRAMES))


@pytest.fixture(scope="module")
def usual(rig, encoded):
    return rig.sample(encoded)


@pytest.fixture
def works(comfy_version):
    if (0, 3, 75) < comfy_version < (0, 33):
        pytest.skip("not known of this version")
    return comfy_version >= (0, 33)


@pytest.mark.parametrize(
    "schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"]
)
def test_windows_change_nothing_or_are_refused(rig, encoded, usual, works, schedule):
    model = windowed(rig.loaded.model, context_schedule=schedule)
    if works:
        clip = rig.sample(encoded, model)
        assert float((clip - usual).norm() / usual.norm()) < 1e-5
    else:
        with pytest.raises(ValueError, match=r"frame \d would see the flow of frame 1\. .*update"):
            rig.sample(encoded, model)


def test_a_window_that_keeps_the_flow_of_frame_1_is_refused(rig, encoded, works):
    """Core's list of latents to retain puts the flow of one frame on another."""
    if not works:
        pytest.skip("refused anyway, and has no such list")
    model = windowed(rig.loaded.model, cond_retain_index_list="0", causal_window_fix=False)
    with pytest.raises(ValueError, match=r"frame 3 would see the flow of frame 1\. "):
        rig.sample(encoded, model)


def test_trying_the_windows_leaves_cores_handler_alone(rig, encoded, works):
    if not works:
        pytest.skip("refused")
    model = windowed(rig.loaded.model)
    before = dict(vars(model.model_options["context_handler"]))
    check = rig.module("nodes.native.windows").check_context_windows

    class Guider:
        model_options = model.model_options
        model_patcher = model

    check(Guider, FRAMES)
    assert vars(model.model_options["context_handler"]) == before


def test_windows_longer_than_the_clip_are_none(rig):
    short = rig.encode(rig.flow(3))
    clip, expected = rig.sample(short, windowed(rig.loaded.model)), rig.sample(short)
    assert float((clip - expected).norm() / expected.norm()) < 1e-5
