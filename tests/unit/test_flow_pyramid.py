"""Spatial features of flow: one for each pixel of every level, where the flow is."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from s2dm.flow import FlowField
from s2dm.models import PUPPETS, SD15, FlowAdapter, FlowAdapterConfig, UNetConfig
from s2dm.models.flow_encoder import level_sizes
from s2dm.settings import SettingsError

CONFIG = FlowAdapterConfig(
    fusion="spatial",
    width=32,
    hidden=32,
    levels=(0, 1, 2),
    layers=(("input_1_0", 32), ("middle_0_0", 64)),
)


def make_adapter(**changes):
    torch.manual_seed(0)
    return FlowAdapter(dataclasses.replace(CONFIG, **changes)).eval()


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def as_pictures(tokens, size, levels):
    """The features of each level, (N, width, h, w)."""
    sizes = level_sizes(size, levels)
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    return [part.mT.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 13), st.integers(1, 13))
def test_latents_of_any_size_have_a_feature_for_each_pixel_of_a_level(frames, height, width):
    adapter = make_adapter()
    assert adapter.condition_size(height, width) == (8 * height, 8 * width)
    tokens = adapter.encode(torch.rand(frames, 3, 8 * height, 8 * width) - 0.5)
    expected = sum(-(-height // n) * -(-width // n) for n in (1, 2, 4))
    assert tokens.shape == (frames, expected, 32) and torch.isfinite(tokens).all()
    assert adapter.null_tokens(frames, (height, width)).shape == tokens.shape


@pytest.mark.parametrize("levels", [(0,), (1, 2), (3,)])
def test_levels_without_layers_have_no_features(levels):
    tokens = make_adapter(levels=levels).encode(torch.rand(1, 3, 64, 48))
    sizes = {0: 8 * 6, 1: 4 * 3, 2: 2 * 2, 3: 1}
    assert tokens.shape[1] == sum(sizes[level] for level in levels)


def test_the_levels_are_those_of_the_unets():
    """As convolutions of stride 2 halve the latents in both engines."""
    halve = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for size in [(64, 64), (9, 5), (1, 7), (13, 22)]:
        picture, found = torch.zeros(1, 1, *size), [size]
        for _ in range(3):
            picture = halve(picture)
            found.append(tuple(picture.shape[2:]))
        assert level_sizes(size, (0, 1, 2, 3)) == found
    assert SD15.flow_adapter.levels == (0, 1, 2, 3)
    assert PUPPETS.flow_adapter.levels == (0, 1, 2)
    coarse = UNetConfig(attention_levels=(False, True, False, False))
    assert FlowAdapterConfig.for_unet(coarse).levels == (1, 3)


def test_features_lie_where_the_flow_is():
    """Of what moves in one cell, features change there and next to it, evenly around it."""
    adapter = make_adapter()
    still = torch.zeros(1, 3, 96, 96)
    moving = still.clone()
    moving[:, 0, 48:56, 48:56] = 0.2  # cell (6, 6)
    before, after = (
        as_pictures(adapter.encode(x), (12, 12), (0, 1, 2))[0] for x in (still, moving)
    )
    changed = (before - after).abs().amax(1)[0] > 0
    assert changed[6, 6]
    assert torch.equal(changed.nonzero().amin(0), torch.tensor([5, 5]))
    assert torch.equal(changed.nonzero().amax(0), torch.tensor([7, 7]))


def test_how_much_moves_elsewhere_changes_nothing_here():
    adapter = make_adapter()
    here = torch.rand(1, 3, 64, 192) - 0.5
    other = here.clone()
    other[..., 96:] = torch.rand(1, 3, 64, 96) - 0.5
    one, two = (as_pictures(adapter.encode(x), (8, 24), (0, 1, 2)) for x in (here, other))
    for level, (a, b) in enumerate(zip(one, two, strict=True)):
        count = 12 // 2**level - 2
        torch.testing.assert_close(a[..., :count], b[..., :count])
        assert not torch.allclose(a[..., -count:], b[..., -count:])


def test_null_is_one_vector_a_level_and_not_zero_flow():
    adapter = make_adapter()
    null = as_pictures(adapter.null_tokens(2, (8, 6)), (8, 6), (0, 1, 2))
    for level in null:
        assert torch.equal(level, level[:1, :, :1, :1].expand_as(level))
    assert not torch.equal(null[0][0, :, 0, 0], null[1][0, :, 0, 0])
    still = adapter.tokens(FlowField.zeros(1, 64, 48), (8, 6))
    assert not torch.allclose(still, adapter.null_tokens(1, (8, 6)), atol=0.1)


@pytest.mark.parametrize("pixels, start", [(63, 0), (20, 63), (6, 83)])
def test_a_layer_adds_the_features_of_its_own_level(pixels, start):
    adapter = make_adapter()
    with torch.no_grad():
        adapter.layers["input_1_0"]["to_add"].weight.copy_(torch.eye(32))
    tokens = torch.randn(2, 89, 32)
    q, prompt = torch.randn(2, pixels, 32), torch.randn(2, 20, 32)
    out = adapter.attend("input_1_0", q, prompt, prompt, tokens, (9, 7), attention, 0.5)
    expected = attention(q, prompt, prompt) + 0.5 * tokens[:, start : start + pixels]
    torch.testing.assert_close(out, expected)


def test_channel_and_spatial_is_the_sum_of_both():
    adapter = make_adapter(fusion="channel+spatial")
    for projection in adapter.layers.parameters():
        torch.nn.init.normal_(projection, std=0.2)
    condition = torch.rand(2, 3, 64, 64) - 0.5
    tokens = adapter.encode(condition)
    assert tokens.shape == (2, 77 + 64 + 16 + 4, 32)
    assert torch.equal(tokens[:, :77], adapter.encoder(condition))
    q, prompt = torch.randn(2, 16, 32), torch.randn(2, 77, 32)

    def attend(tokens):
        return adapter.attend("input_1_0", q, prompt, prompt, tokens, (8, 8), attention)

    no_features, no_grid = tokens.clone(), tokens.clone()
    no_features[:, 77:] = 0
    no_grid[:, :77] = 0
    added = attend(no_grid) - attention(q, prompt, prompt)
    torch.testing.assert_close(attend(tokens), attend(no_features) + added)


def test_sizes_that_do_not_fit_are_refused_by_name():
    adapter = make_adapter()
    q, prompt = torch.randn(1, 16, 32), torch.randn(1, 77, 32)
    tokens = adapter.null_tokens(1, (8, 8))

    def attend(tokens, size, q=q):
        adapter.attend("input_1_0", q, prompt, prompt, tokens, size, attention)

    attend(tokens, (8, 8))
    with pytest.raises(ValueError, match=r"expected 75 features for latents of 9x6.*got 84"):
        attend(tokens, (9, 6))
    with pytest.raises(ValueError, match=r"a layer of 8x8, 4x4, 2x2 pixels.*got one of 36"):
        attend(tokens, (8, 8), q=torch.randn(1, 36, 32))
    with pytest.raises(ValueError, match=r"height and width.*got none"):
        attend(tokens, None)
    with pytest.raises(ValueError, match=r"height and width.*got none"):
        adapter.null_tokens(1)
    with pytest.raises(ValueError, match=r"8 pixels for each latent.*got \(60, 64\)"):
        adapter.encode(torch.zeros(1, 3, 60, 64))


def test_an_untrained_adapter_adds_nothing_and_learns_everywhere():
    adapter = make_adapter(fusion="channel+spatial").train()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1.0)
    prompt = torch.randn(4, 77, 32)
    queries = [torch.randn(4, pixels, 32) for pixels in (64, 16, 4)]
    condition, size = torch.randn(3, 3, 64, 64), (8, 8)
    tokens = torch.cat([adapter.encode(condition), adapter.null_tokens(1, size)])
    for q in queries:
        out = adapter.attend("input_1_0", q, prompt, prompt, tokens, size, attention)
        assert torch.equal(out, attention(q, prompt, prompt))
    for _ in range(2):
        tokens = torch.cat([adapter.encode(condition), adapter.null_tokens(1, size)])
        loss = sum(
            adapter.attend("input_1_0", q, prompt, prompt, tokens, size, attention).square().mean()
            for q in queries
        )
        for projection in adapter.layers["middle_0_0"].values():
            loss = loss + projection(tokens).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    silent = [name for name, p in adapter.named_parameters() if not p.grad.abs().sum() > 0]
    assert silent == []


def test_a_long_clip_is_encoded_a_few_frames_at_a_time():
    """The octaves of a whole clip at its own size would take more memory than the U-Net."""
    adapter, calls = make_adapter(), []
    adapter.pyramid.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    field = FlowField(
        torch.cat([torch.zeros(1, 2, 512, 512), torch.randn(4, 2, 512, 512)]),
        torch.zeros(5, 1, 512, 512),
    )
    with torch.no_grad():
        adapter.tokens(field, (64, 64))
    assert calls == [1] * 5


@pytest.mark.parametrize("levels", [(), (0, 0), (1, 0), (-1,), (99,), (0.5,), "01"])
def test_levels_that_make_no_sense_are_refused(levels):
    with pytest.raises(SettingsError, match=r"FlowAdapterConfig.levels: expected ascending"):
        dataclasses.replace(CONFIG, levels=levels)
