"""The flow generator of stage 1: its sizes, its conditions, and what it refuses."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_flow_generator import SMALL, draw, largest, make, on_meta

from s2dm.models import FlowGeneratorConfig
from s2dm.settings import SettingsError

LFDM = FlowGeneratorConfig()


# Sizes


def test_published_sizes_have_the_published_number_of_parameters():
    assert sum(weight.numel() for weight in on_meta(LFDM).parameters()) == 42_731_203
    assert on_meta(LFDM).first.weight.shape[1] == 259


@pytest.mark.parametrize("frames", [1, 2, 16, 17, 64])
def test_any_number_of_frames(frames):
    with torch.no_grad():
        out = make()(**draw(frames=frames, batch=1))
    assert out.shape == (1, frames, 3, 8, 6)
    assert torch.isfinite(out).all()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    st.sampled_from(["frame", "clip"]),
    st.sampled_from(["nearest", "transposed"]),
    st.booleans(),
    st.integers(1, 2),
)
def test_shape_for_every_config(mult, norm, upsample, motion, cells):
    config = dataclasses.replace(
        SMALL, channel_mult=tuple(mult), norm=norm, upsample=upsample, motion_strength=motion
    )
    # At a single place per frame reflection has nothing to reflect, but upsampling doubles first.
    height, width = config.factor * cells, config.factor * 2
    with torch.no_grad():
        out = make(config)(**draw(config, 1, 2, height, width))
    assert out.shape == (1, 2, 3, height, width)


def test_it_can_be_built_without_weights_and_imported_without_diffusers():
    assert {weight.device.type for weight in on_meta(LFDM).state_dict().values()} == {"meta"}
    code = "import sys; sys.modules['diffusers'] = None; import s2dm.models.lfdm"
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


def test_half_precision_agrees_roughly():
    net = make()
    arguments = draw()
    with torch.no_grad():
        exact = net(**arguments)
        for name in ("sample", "reference", "text"):
            arguments[name] = arguments[name].bfloat16()
        half = net.bfloat16()(**arguments)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


def test_a_patch_is_a_square_of_the_flow():
    """The channels of the heads become the cells of each square, in reading order."""
    net = make(patch=2)
    with torch.no_grad():
        for head, values in (
            (net.flow_head, torch.arange(8.0)),
            (net.occlusion_head, -torch.ones(4)),
        ):
            head.conv.weight.zero_()
            head.conv.bias.copy_(values)
    out = net(torch.randn(1, 3, 3, 8, 12), torch.tensor([5]))
    assert out.shape == (1, 3, 3, 8, 12)
    squares = out[0, 0].unfold(1, 2, 2).unfold(2, 2, 2)
    assert torch.equal(squares[0], torch.tensor([[0.0, 1], [2, 3]]).expand(4, 6, 2, 2))
    assert torch.equal(squares[1], torch.tensor([[4.0, 5], [6, 7]]).expand(4, 6, 2, 2))
    assert torch.equal(squares[2], -torch.ones(4, 6, 2, 2))
    with pytest.raises(ValueError, match="multiples of 4"):
        net(torch.randn(1, 3, 3, 8, 6), torch.tensor([5]))


# Conditions


@pytest.mark.parametrize("name", ["reference", "text", "motion", "timesteps", "sample"])
def test_every_condition_matters(name):
    net, arguments = make(), draw()
    with torch.no_grad():
        before = net(**arguments)
        after = net(**{**arguments, name: arguments[name] * 1.5 + 1})
    assert largest(after - before) > 1e-4


@pytest.mark.parametrize("null", ["learned", "zero"])
@pytest.mark.parametrize("name", ["reference", "text", "motion"])
def test_what_is_not_kept_is_as_not_given(name, null):
    net = make(null_reference=null, null_text=null)
    arguments = draw()
    with torch.no_grad():
        given = net(**arguments)
        absent = net(**{**arguments, name: None})
        mixed = net(**arguments, **{f"keep_{name}": torch.tensor([True, False])})
    assert largest(given[1] - absent[1]) > 1e-4
    torch.testing.assert_close(mixed[0], given[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], absent[1], rtol=1e-4, atol=1e-5)


def test_zero_null_labels_are_zeros_and_no_weights():
    net = make(null_reference="zero", null_text="zero")
    assert not any("null_text" in name or "null_ref" in name for name in net.state_dict())
    arguments = draw()
    zeros = {name: torch.zeros_like(arguments[name]) for name in ("reference", "text")}
    with torch.no_grad():
        absent = net(**{**arguments, "reference": None, "text": None})
        torch.testing.assert_close(absent, net(**{**arguments, **zeros}), rtol=1e-4, atol=1e-5)


def test_motion_strength_changes_nothing_until_it_is_trained():
    net, arguments = make(disturbed=False), draw()
    plain = make(disturbed=False, motion_strength=False)
    left = net.load_state_dict(plain.state_dict(), strict=False)
    assert left.missing_keys and all("motion" in name for name in left.missing_keys)
    motion = arguments.pop("motion")
    with torch.no_grad():
        expected = plain(**arguments)
        assert torch.equal(net(**arguments), expected)
        assert torch.equal(net(**arguments, motion=motion), expected)
        assert torch.equal(net(**arguments, motion=motion * 100), expected)


def test_reference_of_another_size_is_resized():
    net, arguments = make(), draw()
    flat = arguments["reference"].mean(dim=(2, 3), keepdim=True)
    with torch.no_grad():
        expected = net(**{**arguments, "reference": flat.expand(-1, -1, 8, 6)})
        for size in ((1, 1), (3, 5), (16, 12)):
            got = net(**{**arguments, "reference": flat.expand(-1, -1, *size)})
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_reference_in_half_precision_is_resized_too(dtype):
    net, arguments = make().to(dtype), draw()
    arguments = {name: x if name == "timesteps" else x.to(dtype) for name, x in arguments.items()}
    arguments["reference"] = arguments["reference"].repeat(1, 1, 2, 2)
    with torch.no_grad():
        assert torch.isfinite(net(**arguments)).all()


def test_the_reference_is_one_more_input_of_the_first_convolution():
    net, arguments = make(), draw()
    sample, reference = arguments["sample"], arguments["reference"]
    with torch.no_grad():
        joined = torch.cat([sample, reference[:, None].expand(-1, 3, -1, -1, -1)], dim=2)
        expected = net.first(joined.flatten(0, 1)).unflatten(0, (2, 3))
        torch.testing.assert_close(net._first(sample, reference), expected, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_weight():
    net, arguments = make().train(), draw()
    keep = torch.tensor([True, False])
    net(
        **arguments, keep_reference=keep, keep_text=keep, keep_motion=keep
    ).square().sum().backward()
    missing = [
        name
        for name, weight in net.named_parameters()
        if weight.grad is None or not torch.isfinite(weight.grad).all() or not weight.grad.any()
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample", torch.zeros(2, 3, 4, 8, 6), r"\(batch, frames, 3, height, width\)"),
        ("sample", torch.zeros(2, 0, 3, 8, 6), r"\(batch, frames, 3, height, width\)"),
        ("sample", torch.zeros(2, 3, 3, 7, 6), "multiples of 2"),
        ("reference", torch.zeros(2, 5, 8, 6), r"\(2, 4, height, width\), got \(2, 5, 8, 6\)"),
        ("reference", torch.zeros(1, 4, 8, 6), r"\(2, 4, height, width\)"),
        ("text", torch.zeros(2, 77, 64), r"\(2, 64\), got \(2, 77, 64\)"),
        ("motion", torch.zeros(3), r"\(2,\), got \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: expected .*{message}"):
        make()(**{**draw(), name: value})


def test_motion_is_refused_where_there_is_none():
    config = dataclasses.replace(SMALL, motion_strength=False)
    with pytest.raises(ValueError, match="without motion strength"):
        make(config)(**draw(config), motion=torch.zeros(2))


def test_config_turns_into_plain_data_and_back():
    assert FlowGeneratorConfig.from_dict(SMALL.to_dict()) == SMALL


@pytest.mark.parametrize(
    "entry",
    [
        {"model_channels": 7},
        {"head_dim": 31},
        {"norm_groups": 5},
        {"channel_mult": []},
        {"norm": "batch"},
        {"upsample": "bicubic"},
        {"null_text": ""},
        {"null_reference": None},
        {"motion_strength": 1},
    ],
)
def test_config_refuses(entry):
    with pytest.raises(SettingsError, match=next(iter(entry))):
        FlowGeneratorConfig.from_dict(entry)
