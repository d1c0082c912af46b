"""Where the frames of a flow generator meet, and what they know of their order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_flow_generator import draw, largest, make

from s2dm.models.attention3d import RelativePositionBias, TemporalAttention, rotate

HERE = Path(__file__).parent


@pytest.mark.parametrize("norm", ["frame", "clip"])
def test_clips_of_a_batch_are_independent(norm):
    net, arguments = make(norm=norm), draw(batch=3)
    with torch.no_grad():
        together = net(**arguments)
        for i in range(3):
            alone = net(**{name: value[i : i + 1] for name, value in arguments.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def frames_that_change(net):
    """Indices of the frames whose output changes with the input of frame 1 of 4."""
    arguments = draw(batch=1, frames=4)
    with torch.no_grad():
        before = net(**arguments)
        arguments["sample"] = arguments["sample"].clone()
        arguments["sample"][:, 1] += 1
        after = net(**arguments)
    return [i for i in range(4) if largest(after[:, i] - before[:, i]) > 1e-5]


def without_temporal_attention(net):
    for module in net.modules():
        if isinstance(module, TemporalAttention):
            torch.nn.init.zeros_(module.to_out.weight)
    return net


def test_frames_meet_in_temporal_attention_only():
    assert frames_that_change(make()) == [0, 1, 2, 3]
    assert frames_that_change(without_temporal_attention(make())) == [1]


def test_a_norm_over_the_clip_lets_frames_meet_too():
    net = without_temporal_attention(make(norm="clip"))
    assert frames_that_change(net) == [0, 1, 2, 3]


def test_the_order_of_frames_matters():
    net, arguments = make(), draw(batch=1, frames=4)
    with torch.no_grad():
        forward = net(**arguments)
        backward = net(**{**arguments, "sample": arguments["sample"].flip(1)}).flip(1)
    assert largest(forward - backward) > 1e-3


# Positions


def test_buckets_of_relative_positions():
    buckets = RelativePositionBias.bucket(torch.arange(-63, 64))
    golden = np.load(HERE / "data" / "lfdm_golden.npz")["buckets"]
    assert buckets.tolist() == golden.tolist()
    near = RelativePositionBias.bucket(torch.arange(-7, 8)).tolist()
    assert near == [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]
    assert RelativePositionBias.bucket(torch.tensor([-32, -63, 32, 63])).tolist() == [
        15,
        15,
        31,
        31,
    ]


def test_bias_depends_on_the_offset_alone():
    bias = RelativePositionBias(3)(20)
    assert bias.shape == (3, 20, 20)
    for offset in (-19, -3, 0, 4, 12):
        diagonal = bias.diagonal(offset, 1, 2)
        assert torch.equal(diagonal, diagonal[:, :1].expand_as(diagonal))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 8, 32, 40]), st.integers(0, 30), st.integers(0, 30), st.integers(0, 33))
def test_rotation_keeps_lengths_and_sees_offsets_alone(dims, i, j, shift):
    torch.manual_seed(0)
    q, k = torch.randn(2, dims, dtype=torch.float64)
    many_q, many_k = rotate(q.expand(64, -1)), rotate(k.expand(64, -1))
    torch.testing.assert_close(many_q.norm(dim=-1), q.norm().expand(64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        many_q[i] @ many_k[j], many_q[i + shift] @ many_k[j + shift], rtol=1e-3, atol=1e-3
    )
