"""The flow generator of stage 1: what its frames see, its conditions, and LFDM's weights."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import lfdm_recipe as recipe
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.models import FlowGenerator, FlowGeneratorConfig
from s2dm.models.attention3d import RelativePositionBias, TemporalAttention, rotate
from s2dm.models.config import ConfigError
from s2dm.models.lfdm import PREFIX, from_lfdm, lfdm_config, lfdm_keys, to_lfdm

HERE = Path(__file__).parent

LFDM = FlowGeneratorConfig()
NATOPS = FlowGeneratorConfig(null_text="learned", upsample="nearest")
SMALL = FlowGeneratorConfig(
    reference_channels=4,
    text_dim=6,
    model_channels=8,
    channel_mult=(1, 2),
    num_heads=2,
    head_dim=8,
    norm_groups=4,
    norm="frame",
    upsample="nearest",
    null_reference="learned",
    null_text="learned",
    motion_strength=True,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(config=SMALL, disturbed=True, **changes):
    """A network; disturbed, so that nothing is zero merely because it starts at zero."""
    torch.manual_seed(0)
    net = FlowGenerator(dataclasses.replace(config, **changes)).eval()
    if disturbed:
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return net


def draw(config=SMALL, batch=2, frames=3, height=8, width=6):
    torch.manual_seed(1)
    arguments = {
        "sample": torch.randn(batch, frames, 3, height, width),
        "timesteps": torch.arange(batch) * 300 + 5,
        "reference": torch.randn(batch, config.reference_channels, height, width),
        "text": torch.randn(batch, config.text_dim),
    }
    if config.motion_strength:
        arguments["motion"] = torch.linspace(0.01, 0.05, batch)
    return arguments


def on_meta(config):
    with torch.device("meta"):
        return FlowGenerator(config)


def largest(difference):
    return difference.abs().max().item()


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
    assert all(weight.is_meta for weight in on_meta(LFDM).state_dict().values())
    code = "import sys; sys.modules['diffusers'] = None; import s2dm.models.lfdm"
    root = str(HERE.parent.parent)
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


# What a frame sees


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
    assert all("motion" in name for name in left.missing_keys)
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
        ("text", torch.zeros(2, 77, 6), r"\(2, 6\), got \(2, 77, 6\)"),
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
    with pytest.raises(ConfigError, match=next(iter(entry))):
        FlowGeneratorConfig.from_dict(entry)


# LFDM's weights


def lfdm_state(config):
    """A state dict by LFDM's names, written out here from its published layout."""
    dims = [config.model_channels, *config.widths]
    time = 4 * config.model_channels
    hidden = config.num_heads * config.head_dim
    shapes = {}

    def put(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def block(name, before, after, conditioned=True):
        if conditioned:
            put(f"{name}.mlp.1", 2 * after, time + config.text_dim)
        for number, width in ((1, before), (2, after)):
            put(f"{name}.block{number}.proj", after, width, 1, 3, 3)
            put(f"{name}.block{number}.norm", after)
        if before != after:
            put(f"{name}.res_conv", after, before, 1, 1, 1)

    def attention(name, width, rotary=True):
        shapes[f"{name}.fn.norm.gamma"] = (1, width, 1, 1, 1)
        put(f"{name}.fn.fn.fn.to_qkv", 3 * hidden, width, bias=False)
        put(f"{name}.fn.fn.fn.to_out", width, hidden, bias=False)
        if rotary:
            shapes[f"{name}.fn.fn.fn.rotary_emb.freqs"] = (16,)

    def linear_attention(name, width):
        shapes[f"{name}.fn.norm.gamma"] = (1, width, 1, 1, 1)
        put(f"{name}.fn.fn.to_qkv", 3 * hidden, width, 1, 1, bias=False)
        put(f"{name}.fn.fn.to_out", width, hidden, 1, 1)

    put("init_conv", dims[0], 3 + config.reference_channels, 1, 7, 7)
    attention("init_temporal_attn", dims[0])
    put("time_rel_pos_bias.relative_attention_bias", 32, config.num_heads, bias=False)
    put("time_mlp.1", time, dims[0])
    put("time_mlp.3", time, time)
    levels = len(config.widths)
    for i in range(levels):
        for side, before, width in (
            (f"downs.{i}", dims[i], dims[i + 1]),
            (f"ups.{i}", 2 * dims[levels - i], dims[levels - i - 1]),
        ):
            block(f"{side}.0", before, width)
            block(f"{side}.1", width, width)
            linear_attention(f"{side}.2", width)
            attention(f"{side}.3", width)
        if i < levels - 1:
            put(f"downs.{i}.4", dims[i + 1], dims[i + 1], 1, 4, 4)
            width = dims[levels - i - 1]
            if config.upsample == "nearest":
                put(f"ups.{i}.4.1", width, width, 1, 3, 3)
            else:
                put(f"ups.{i}.4", width, width, 1, 4, 4)
    block("mid_block1", dims[-1], dims[-1])
    attention("mid_spatial_attn", dims[-1], rotary=False)
    attention("mid_temporal_attn", dims[-1])
    block("mid_block2", dims[-1], dims[-1])
    for head, channels in (("final_conv", 2), ("occlusion_map", 1)):
        block(f"{head}.0", 2 * dims[0], dims[0], conditioned=False)
        put(f"{head}.1", channels, dims[0], 1, 1, 1)
    if config.null_text == "learned":
        shapes["null_cond_emb"] = (1, config.text_dim)
    torch.manual_seed(0)
    state = {f"{PREFIX}{name}": torch.rand(shape) for name, shape in shapes.items()}
    return state | {name: torch.rand(1000) for name in ("betas", "posterior_variance")}


@pytest.mark.parametrize("config", [LFDM, NATOPS], ids=["mhad", "natops"])
def test_a_state_dict_of_lfdm_converts_and_comes_back(config):
    state = lfdm_state(config)
    assert lfdm_config(state) == config
    ours = from_lfdm(state, config)
    result = on_meta(config).load_state_dict(ours, strict=True, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    back = to_lfdm(ours, config)
    weights = {
        name for name in state if name.startswith(PREFIX) and not name.endswith("rotary_emb.freqs")
    }
    assert set(back) == weights
    assert all(torch.equal(back[name], state[name]) for name in weights)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    st.sampled_from(["nearest", "transposed"]),
    st.sampled_from(["learned", "zero"]),
)
def test_every_weight_but_ours_has_one_name_at_lfdm(mult, upsample, null):
    config = dataclasses.replace(SMALL, channel_mult=tuple(mult), upsample=upsample, null_text=null)
    keys = lfdm_keys(config)
    names = [key.ours for key in keys]
    rest = set(on_meta(config).state_dict()) - set(names)
    assert len(set(names)) == len(names) == len({key.lfdm for key in keys})
    assert all("motion" in name or name == "null_reference" for name in rest)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_wrong_state_dict_is_refused(change):
    config = dataclasses.replace(
        SMALL, motion_strength=False, null_reference="zero", upsample="transposed"
    )
    state = lfdm_state(config)
    name = f"{PREFIX}downs.0.1.block2.proj.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        name = f"{PREFIX}another.weight"
        state[name] = torch.zeros(1)
    else:
        state[name] = state[name][:1]
    with pytest.raises(ValueError, match=f"{change}.*{name}|{name}.*{change}"):
        from_lfdm(state, config)


@pytest.mark.parametrize("name", recipe.CASES)
def test_it_computes_what_lfdm_computes(name):
    case = recipe.CASES[name]
    config = FlowGeneratorConfig(**case["ours"])
    weights = {key.lfdm: recipe.fill(key.lfdm, key.lfdm_shape) for key in lfdm_keys(config)}
    net = on_meta(config)
    net.load_state_dict(from_lfdm(weights, config), assign=True)
    sample, timesteps, reference, text = recipe.inputs(name)
    with torch.no_grad():
        out = net(sample, timesteps, reference, None if case["null"] else text)
    golden = torch.from_numpy(np.load(HERE / "data" / "lfdm_golden.npz")[name])
    assert golden.std() > 0.1
    torch.testing.assert_close(recipe.seen(out), golden, rtol=0, atol=1e-4)


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
