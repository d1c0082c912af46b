"""The flow adapter: tokens from flow, and how they enter the attention."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from s2dm.models import SD15, FlowAdapter, FlowAdapterConfig, fuse_attention

CONFIG = FlowAdapterConfig(width=64, hidden=32, layers=(("input_1_0", 32), ("middle_0_0", 64)))


def make_adapter(**settings):
    torch.manual_seed(0)
    return FlowAdapter(dataclasses.replace(CONFIG, **settings)).eval()


def uniform_flow(x, y, height=64, width=48):
    condition = torch.zeros(1, 3, height, width)
    condition[:, 0], condition[:, 1] = x, y
    return condition


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 130), st.integers(1, 130))
def test_any_size_gives_77_tokens(frames, height, width):
    tokens = make_adapter().encode(torch.rand(frames, 3, height, width) - 0.5)
    assert tokens.shape == (frames, 77, 64)
    assert torch.isfinite(tokens).all()


def test_a_frame_does_not_see_the_others():
    adapter = make_adapter()
    condition = torch.randn(4, 3, 64, 64)
    together = adapter.encode(condition)
    alone = torch.cat([adapter.encode(frame[None]) for frame in condition])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_tokens_hardly_depend_on_resolution():
    adapter = make_adapter()
    ramp = torch.linspace(-0.3, 0.3, 128).expand(1, 3, 128, 128).clone()
    large = F.interpolate(ramp, size=(512, 512), mode="bilinear")
    near = (adapter.encode(ramp) - adapter.encode(large)).norm()
    far = (adapter.encode(ramp) - adapter.encode(-ramp)).norm()
    assert near < 0.05 * far


def test_autocast_does_not_round_the_condition():
    """Training has conditions of the encoder's own size; their octaves need all digits."""
    adapter = make_adapter()
    condition = torch.rand(2, 3, *adapter.encoder.size, generator=torch.Generator().manual_seed(0))
    seen = []
    handle = adapter.encoder.blocks.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    try:
        adapter.encode(condition)
        with torch.autocast("cpu", torch.bfloat16):
            adapter.encode(condition)
    finally:
        handle.remove()
    assert torch.equal(*seen)


def test_resize_keeps_constants_and_means():
    from s2dm.models.flow_encoder import _resize

    assert torch.allclose(_resize(torch.full((1, 1, 7, 300), 0.3), (88, 56)), torch.tensor(0.3))
    fine = torch.rand(1, 1, 880, 560)
    reference = F.interpolate(fine, size=(88, 56), mode="bilinear", antialias=True)
    torch.testing.assert_close(_resize(fine, (88, 56)), reference, rtol=0, atol=1e-4)


def test_speed_of_a_motion_is_visible():
    """Small, double and zero motion have clearly different codes, before any training."""
    adapter = make_adapter()
    codes = [adapter.encode(uniform_flow(x, 0.0)) for x in (0.0, 0.03, 0.06, 0.12)]
    for i, a in enumerate(codes):
        for b in codes[i + 1 :]:
            assert (a - b).pow(2).mean().sqrt() > 0.05


def test_zero_flow_is_not_the_null_label():
    adapter = make_adapter()
    assert not torch.allclose(adapter.encode(uniform_flow(0, 0)), adapter.null_tokens(1), atol=0.1)
    assert adapter.null_tokens(3).shape == (3, 77, 64)


def test_untrained_projections_are_zero():
    adapter = make_adapter()
    k, v = adapter.keys_values("middle_0_0", adapter.null_tokens(2))
    assert k.shape == v.shape == (2, 77, 64)
    assert not k.any() and not v.any()


def test_bad_input_is_refused_in_plain_words():
    adapter = make_adapter()
    with pytest.raises(ValueError, match=r"expected \(frames, 3, height, width\), got \(2, 2,"):
        adapter.encode(torch.zeros(2, 2, 8, 8))
    with pytest.raises(ValueError, match=r"input_1_0.*got 'output_9_0'"):
        adapter.keys_values("output_9_0", adapter.null_tokens(1))


def test_channel_fusion_is_concatenation_along_channels():
    """[tau; f] W = tau W_tau + f W_f, section 3.3 of the paper."""
    torch.manual_seed(0)
    q, text, flow = torch.randn(2, 9, 32), torch.randn(2, 77, 16), torch.randn(2, 77, 24)
    w_k, w_v = torch.randn(40, 32), torch.randn(40, 32)
    joined = torch.cat([text, flow], dim=2)
    expected = attention(q, joined @ w_k, joined @ w_v)
    got = fuse_attention(
        q,
        text @ w_k[:16],
        text @ w_v[:16],
        flow @ w_k[16:],
        flow @ w_v[16:],
        "channel",
        attention,
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", ["channel", "token"])
@pytest.mark.parametrize("length", [77, 100, 154, 231])
def test_zero_flow_values_change_no_bit(fusion, length):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 32), torch.randn(2, length, 32), torch.randn(2, length, 32)
    zero = torch.zeros(2, 77, 32)
    assert torch.equal(fuse_attention(q, k, v, zero, zero, fusion, attention), attention(q, k, v))


def test_long_prompts_repeat_the_flow():
    """A prompt repeated to 154 tokens, with its flow, attends as the prompt of 77 does."""
    torch.manual_seed(0)
    q, k, v, fk, fv = torch.randn(2, 9, 32), *(torch.randn(2, 77, 32) for _ in range(4))
    short = fuse_attention(q, k, v, fk, fv, "channel", attention)
    long = fuse_attention(q, k.repeat(1, 2, 1), v.repeat(1, 2, 1), fk, fv, "channel", attention)
    torch.testing.assert_close(long, short, rtol=1e-5, atol=1e-5)


def test_fusion_refuses_short_prompts_and_unknown_names():
    x, flow = torch.randn(1, 20, 32), torch.zeros(1, 77, 32)
    with pytest.raises(ValueError, match="at least 77 tokens, got 20"):
        fuse_attention(x, x, x, flow, flow, "channel", attention)
    with pytest.raises(ValueError, match=r"one of .* got 'sum'"):
        fuse_attention(x, x, x, flow, flow, "sum", attention)


def test_training_reaches_every_weight():
    """Once the projections have left zero, the gradient arrives at all of the encoder."""
    adapter = make_adapter().train()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1.0)
    q, prompt = torch.randn(4, 9, 32), torch.randn(4, 77, 32)
    condition = torch.randn(3, 3, 32, 32)
    for _ in range(2):
        tokens = torch.cat([adapter.encode(condition), adapter.null_tokens(1)])
        k, v = adapter.keys_values("input_1_0", tokens)
        loss = fuse_attention(q, prompt, prompt, k, v, "channel", attention).square().mean()
        for name in ("to_k", "to_v"):
            loss = loss + adapter.layers["middle_0_0"][name](tokens).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    silent = [name for name, p in adapter.named_parameters() if not p.grad.abs().sum() > 0]
    assert silent == []


def test_bfloat16():
    adapter = make_adapter().to(torch.bfloat16)
    assert adapter.encode(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_full_size_adapter():
    adapter = FlowAdapter(SD15.flow_adapter, device="meta")
    assert len(adapter.layers) == 16
    assert adapter.layers["middle_0_0"]["to_k"].weight.shape == (1280, 256)
