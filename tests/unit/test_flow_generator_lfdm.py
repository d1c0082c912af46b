"""LFDM's weights in the flow generator: their names, and what the network computes with them."""

import dataclasses
from pathlib import Path

import lfdm_recipe as recipe
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_flow_generator import SMALL, on_meta

from s2dm.models import FlowGeneratorConfig
from s2dm.models.lfdm import PREFIX, from_lfdm, lfdm_config, lfdm_keys

HERE = Path(__file__).parent

LFDM = FlowGeneratorConfig(flow="positions")
NATOPS = dataclasses.replace(LFDM, null_text="learned", upsample="nearest")


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
    back = {key.lfdm: ours[key.ours].reshape(key.lfdm_shape) for key in lfdm_keys(config)}
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
    assert "null_reference" in rest
    assert all("motion" in name for name in rest - {"null_reference"})
    assert len(rest) > 1


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
