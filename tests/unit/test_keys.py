"""Names and shapes of the weights, against the architectures they describe."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.models import (
    PUPPETS,
    SD15,
    FlowAdapter,
    FlowAdapterConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from s2dm.models.keys import (
    attention_names,
    own_keys,
    text_encoder_keys,
    to_diffusers,
    to_ldm,
    unet_keys,
    vae_keys,
)


def ldm_shapes(keys):
    return {key.ldm: key.ldm_shape for key in keys}


def diffusers_shapes(keys):
    return {key.diffusers: key.diffusers_shape for key in keys}


def shapes_of(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


unet_configs = st.integers(1, 3).flatmap(
    lambda levels: st.builds(
        UNetConfig,
        model_channels=st.sampled_from([32, 64]),
        channel_mult=st.tuples(st.just(1), *[st.integers(1, 3)] * (levels - 1)),
        num_res_blocks=st.integers(1, 3),
        attention_levels=st.tuples(*[st.booleans()] * levels),
        num_heads=st.sampled_from([1, 2, 8]),
        context_dim=st.sampled_from([16, 48]),
    )
)
vae_configs = st.builds(
    VAEConfig,
    channels=st.sampled_from([32, 64]),
    channel_mult=st.lists(st.integers(1, 3), max_size=3).map(lambda rest: (1, *rest)),
    num_res_blocks=st.integers(1, 3),
    latent_channels=st.integers(1, 8),
)


def test_stable_diffusion_has_its_known_weights():
    unet, vae = ldm_shapes(unet_keys(SD15.unet)), ldm_shapes(vae_keys(SD15.vae))
    text = ldm_shapes(text_encoder_keys(SD15.text_encoder))
    assert (len(unet), len(vae), len(text)) == (686, 248, 196)
    assert unet["time_embed.0.weight"] == (1280, 320)
    assert unet["input_blocks.0.0.weight"] == (320, 4, 3, 3)
    assert unet["input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert unet["input_blocks.4.0.skip_connection.weight"] == (640, 320, 1, 1)
    assert unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == (1280, 768)
    assert unet["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert unet["output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert unet["output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight"] == (2560, 320)
    assert unet["out.2.weight"] == (4, 320, 3, 3)
    assert vae["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert vae["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert vae["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert vae["quant_conv.weight"] == (8, 8, 1, 1)
    assert text["text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert text["text_model.encoder.layers.11.mlp.fc1.weight"] == (3072, 768)


def test_layer_names_are_those_that_comfyui_reports():
    names = [name for name, _ in SD15.unet.cross_attention_layers()]
    inputs = [f"input_{i}_0" for i in (1, 2, 4, 5, 7, 8)]
    assert names == [*inputs, "middle_0_0", *(f"output_{i}_0" for i in range(3, 12))]


@settings(max_examples=8, deadline=None)
@given(unet_configs)
def test_unet_is_diffusers_unet(config):
    attention = pytest.importorskip("s2dm.pipelines.attention")
    modules = pytest.importorskip("s2dm.pipelines.modules")
    with torch.device("meta"):
        unet = modules.build_unet(config)
    assert shapes_of(unet) == diffusers_shapes(unet_keys(config))
    assert attention.unet_config(unet) == config


@settings(max_examples=8, deadline=None)
@given(vae_configs)
def test_vae_is_diffusers_vae(config):
    modules = pytest.importorskip("s2dm.pipelines.modules")
    with torch.device("meta"):
        vae = modules.build_vae(config)
    assert shapes_of(vae) == diffusers_shapes(vae_keys(config))


@pytest.mark.parametrize("config", [SD15.text_encoder, PUPPETS.text_encoder])
def test_text_encoder_is_transformers_text_encoder(config):
    modules = pytest.importorskip("s2dm.pipelines.modules")
    with torch.device("meta"):
        encoder = modules.build_text_encoder(config)
    state = modules.text_encoder_state(encoder, config)
    assert {n: tuple(w.shape) for n, w in state.items()} == ldm_shapes(text_encoder_keys(config))


@settings(max_examples=25, deadline=None)
@given(unet_configs)
def test_layer_names_follow_the_modules(config):
    """The names computed from the config, and those read off the key table, are the same."""
    layers = config.cross_attention_layers()
    assert list(attention_names(config).values()) == [name for name, _ in layers]
    keys = diffusers_shapes(unet_keys(config))
    for (_, width), path in zip(layers, attention_names(config), strict=True):
        assert keys[f"{path}.to_k.weight"] == (width, config.context_dim)


@settings(max_examples=25, deadline=None)
@given(st.one_of(unet_configs.map(unet_keys), vae_configs.map(vae_keys)))
def test_names_are_unique_and_the_way_back_is_the_way_there(keys):
    assert len(ldm_shapes(keys)) == len(diffusers_shapes(keys)) == len(keys)
    state = {key.ldm: torch.empty(key.ldm_shape, device="meta") for key in keys}
    there = to_diffusers(state, keys)
    back = to_ldm(there, keys)
    assert {name: tuple(w.shape) for name, w in there.items()} == diffusers_shapes(keys)
    assert {name: tuple(w.shape) for name, w in back.items()} == ldm_shapes(keys)


def test_values_survive_the_round_trip():
    config = VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    keys = vae_keys(config)
    state = {key.ldm: torch.randn(key.ldm_shape) for key in keys}
    back = to_ldm(to_diffusers(state, keys), keys)
    assert all(torch.equal(state[name], back[name]) for name in state)


def test_a_missing_weight_is_named():
    keys = text_encoder_keys(TextEncoderConfig(layers=1))
    state = {key.ldm: torch.empty(key.ldm_shape, device="meta") for key in keys[1:]}
    with pytest.raises(ValueError, match="token_embedding"):
        to_diffusers(state, keys)


def test_adapter_keys_are_the_adapters():
    config = FlowAdapterConfig(width=64, hidden=32, layers=(("input_1_0", 32),))
    assert shapes_of(FlowAdapter(config)) == ldm_shapes(own_keys(FlowAdapter, config))
