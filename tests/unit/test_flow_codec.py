"""Flow as stage 1 diffuses it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField
from s2dm.models import FlowGeneratorConfig, constrain, decode_flow, encode_flow, mean_motion

CONFIG = FlowGeneratorConfig(displacement_scale=0.25, threshold=0.0)


def _flow(frames: int, height: int, width: int, seed: int = 0) -> FlowField:
    generator = torch.Generator().manual_seed(seed)
    displacement = torch.randn(frames, 2, height, width, generator=generator) * 5
    occlusion = torch.rand(frames, 1, height, width, generator=generator)
    displacement[0], occlusion[0] = 0, 0
    return FlowField(displacement, occlusion)


@given(st.integers(1, 5), st.integers(2, 20), st.integers(2, 20), st.floats(0.01, 4))
@settings(max_examples=30, deadline=None)
def test_decoding_undoes_encoding(frames, height, width, scale):
    config = dataclasses.replace(CONFIG, displacement_scale=scale)
    flow = _flow(frames, height, width)
    back = decode_flow(encode_flow(flow.condition(height, width), config), config, height, width)
    torch.testing.assert_close(back.displacement, flow.displacement, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back.occlusion, flow.occlusion, rtol=1e-4, atol=1e-5)


def test_no_motion_is_the_sample_that_frame_1_gets():
    still = encode_flow(FlowField.zeros(2, 8, 8).condition(8, 8), CONFIG)
    guess = torch.randn(3, 4, 3, 8, 8)
    constrained = constrain(guess, CONFIG)
    torch.testing.assert_close(constrained[:, 0], still[:1].expand(3, -1, -1, -1))
    assert torch.equal(constrained[:, 1:], guess[:, 1:])


def test_dynamic_thresholding_keeps_small_clips_and_bounds_large_ones():
    config = dataclasses.replace(CONFIG, threshold=0.9)
    small = torch.rand(1, 4, 3, 8, 8) * 2 - 1
    assert torch.equal(constrain(small, config)[:, 1:], small[:, 1:])
    large = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    cut = constrain(large, config)
    assert cut.abs().amax() <= 1
    limit = torch.quantile(large[1].abs(), 0.9)
    torch.testing.assert_close(cut[1, 1:], large[1, 1:].clamp(-limit, limit) / limit)


def test_mean_motion_is_in_half_frames_and_by_clip():
    displacement = torch.zeros(2, 2, 6, 10)
    # 0.6 of half the width and 0.8 of half the height: one half-frame, in one of two frames.
    displacement[1, 0], displacement[1, 1] = 3.0, 2.4
    condition = FlowField(displacement, torch.zeros(2, 1, 6, 10)).condition(12, 12)
    motion = mean_motion(torch.stack([condition, condition * 2]))
    torch.testing.assert_close(motion, torch.tensor([0.5, 1.0]))


def test_a_sample_of_another_shape_is_refused():
    with pytest.raises(FlowError, match="condition: expected"):
        decode_flow(torch.zeros(1, 2, 3, 8, 8), CONFIG, 8, 8)
