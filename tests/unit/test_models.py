"""The networks as diffusers and transformers build them, with the flow adapter attached."""

import dataclasses
import json

import pytest
import torch
from random_checkpoint import TINY

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.models import (
    FORMAT_VERSION,
    FUSIONS,
    PUPPETS,
    SD15,
    FlowAdapter,
    FlowAdapterConfig,
    FlowSampling,
    S2DMConfig,
    SamplingConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    read_config,
    train_tokenizer,
    with_tokenizer,
)
from s2dm.models.keys import unet_keys
from s2dm.settings import SettingsError

attention = pytest.importorskip("s2dm.pipelines.attention")
modules = pytest.importorskip("s2dm.pipelines.modules")

UNET = dataclasses.replace(TINY.unet, attention_levels=(False, True))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return modules.build_unet(UNET).eval()


def make_adapter(fusion="channel", trained=False):
    torch.manual_seed(1)
    config = FlowAdapterConfig.for_unet(UNET, fusion=fusion, width=32, hidden=32)
    adapter = FlowAdapter(config)
    if trained:
        for projection in adapter.layers.parameters():
            torch.nn.init.normal_(projection, std=0.3)
    return adapter


def inputs(frames=3, length=77):
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(frames, 4, 8, 8, generator=generator),
        torch.full((frames,), 500),
        torch.randn(1, length, UNET.context_dim, generator=generator).expand(frames, -1, -1),
    )


def flow(frames=3):
    return torch.randn(frames, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def kwargs(tokens):
    return {"cross_attention_kwargs": {"flow_tokens": tokens, "flow_size": (8, 8)}}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("length", [77, 154])
@torch.no_grad()
def test_an_untrained_adapter_changes_no_bit(fusion, length):
    torch.manual_seed(0)
    unet = modules.build_unet(UNET).eval()
    before = unet(*inputs(length=length)).sample
    adapter = make_adapter(fusion)
    attention.attach_adapter(unet, adapter)
    tokens = adapter.encode(flow())
    after = unet(*inputs(length=length), **kwargs(tokens)).sample
    assert torch.equal(before, after)
    assert torch.equal(before, unet(*inputs(length=length)).sample)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_a_trained_adapter_acts_on_each_frame_alone(unet, fusion):
    adapter = make_adapter(fusion, trained=True)
    attention.attach_adapter(unet, adapter)
    plain = unet(*inputs()).sample
    tokens = adapter.encode(flow())
    out = unet(*inputs(), **kwargs(tokens)).sample
    assert (out - plain).abs().max() > 1e-3
    tokens[1] = adapter.null_tokens(1, (8, 8))[0]
    other = unet(*inputs(), **kwargs(tokens)).sample
    torch.testing.assert_close(other[[0, 2]], out[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (other[1] - out[1]).abs().max() > 1e-3


def test_training_moves_adapter_and_unet(unet):
    adapter = make_adapter()
    attention.attach_adapter(unet, adapter)
    tokens = adapter.encode(flow())
    unet(*inputs(), cross_attention_kwargs={"flow_tokens": tokens}).sample.sum().backward()
    for name, _ in adapter.config.layers:
        assert adapter.layers[name]["to_v"].weight.grad.abs().sum() > 0
    assert unet.conv_in.weight.grad.abs().sum() > 0
    unet.zero_grad()


def test_the_unet_does_not_register_the_adapter(unet):
    attention.attach_adapter(unet, make_adapter())
    assert modules.unet_state(unet, UNET).keys() == {k.ldm for k in unet_keys(UNET)}
    assert len(unet.state_dict()) == len(unet_keys(UNET))


def test_an_adapter_for_another_unet_is_refused(unet):
    config = FlowAdapterConfig(width=32, hidden=32, layers=(("middle_0_0", 96),))
    with pytest.raises(ValueError, match="made for another U-Net"):
        attention.attach_adapter(unet, FlowAdapter(config))


@torch.no_grad()
def test_layers_that_an_adapter_leaves_out_see_the_prompt_alone(unet):
    whole = make_adapter(trained=True)
    config = dataclasses.replace(whole.config, layers=whole.config.layers[:1])
    part = FlowAdapter(config)
    state = whole.state_dict()
    part.load_state_dict({key: state[key] for key in part.state_dict()})
    tokens = {"flow_tokens": part.encode(flow())}
    attention.attach_adapter(unet, part)
    out = unet(*inputs(), cross_attention_kwargs=tokens).sample
    assert not torch.equal(out, unet(*inputs()).sample)
    first = whole.config.layers[0][0]
    for name, layer in whole.layers.items():
        if name != first:
            for projection in layer.values():
                projection.weight.zero_()
    attention.attach_adapter(unet, whole)
    torch.testing.assert_close(out, unet(*inputs(), cross_attention_kwargs=tokens).sample)


@pytest.mark.parametrize(
    ("part", "make", "read"),
    [
        (UNET, modules.build_unet, modules.unet_state),
        (
            dataclasses.replace(TINY.vae, channel_mult=(1, 2)),
            modules.build_vae,
            modules.vae_state,
        ),
        (TINY.text_encoder, modules.build_text_encoder, modules.text_encoder_state),
    ],
)
def test_networks_survive_the_files_keys(part, make, read):
    first = make(part)
    second = make(part, read(first, part))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_vae_and_text_encoder_have_the_expected_shapes():
    vae, text = PUPPETS.vae, PUPPETS.text_encoder
    with torch.no_grad():
        latents = modules.build_vae(vae).encode(torch.zeros(1, 3, 64, 48)).latent_dist.mode()
        ids = torch.full((2, 77), text.eos_token_id)
        prompt = modules.build_text_encoder(text)(ids).last_hidden_state
    assert latents.shape == (1, PUPPETS.unet.in_channels, 64 // vae.factor, 48 // vae.factor)
    assert prompt.shape == (2, 77, PUPPETS.unet.context_dim)


def test_tokenizer_of_a_checkpoint():
    config = with_tokenizer(PUPPETS, train_tokenizer(["a man in a red shirt"], 600))
    tokenizer = modules.build_tokenizer(config)
    ids = tokenizer("a red man", padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == 77
    assert ids[0] == config.text_encoder.bos_token_id
    assert ids[4:] == [config.text_encoder.eos_token_id] * 73
    with pytest.raises(ValueError, match="with a text encoder"):
        modules.build_tokenizer(config.adapter_only())


@pytest.mark.parametrize("config", [SD15, PUPPETS, SD15.adapter_only()])
def test_configs_survive_json(config):
    assert S2DMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.format_version == FORMAT_VERSION


def test_configs_refuse_nonsense():
    with pytest.raises(SettingsError, match=r"UNetConfig.num_heads: expected a divisor"):
        dataclasses.replace(UNET, num_heads=7)
    with pytest.raises(SettingsError, match="starts with 1"):
        VAEConfig(channel_mult=(2, 2))
    with pytest.raises(SettingsError, match="unknown setting 'depth'"):
        UNetConfig.from_dict({"depth": 3})
    with pytest.raises(SettingsError, match="layers among"):
        dataclasses.replace(PUPPETS, flow_adapter=FlowAdapterConfig())
    with pytest.raises(SettingsError, match="context_dim, 128"):
        dataclasses.replace(PUPPETS, text_encoder=TextEncoderConfig())
    with pytest.raises(SettingsError, match=r"text_dim equal to .*hidden_size, 768"):
        dataclasses.replace(PUPPETS, unet=None, text_encoder=TextEncoderConfig())


def test_settings_of_sampling_are_replaced_entry_by_entry():
    recommended = SamplingConfig(12, 2.0, 1.5, 0.25)
    assert recommended.replacing(None) == recommended.replacing({}) == recommended
    # None is a setting, too: both guided together.
    changed = recommended.replacing({"steps": 5, "flow_guidance_scale": None})
    assert changed == SamplingConfig(5, 2.0, None, 0.25)
    for entries, message in (
        ({"cfg": 2.0}, "SamplingConfig: unknown setting 'cfg'; it has: steps"),
        ({"steps": 0}, r"SamplingConfig\.steps: expected a whole number from 1 to 100000, got 0"),
        ({"flow_start": 1.5}, r"SamplingConfig\.flow_start: .*0 to 1, got 1\.5"),
        ({"guidance_scale": None}, r"SamplingConfig\.guidance_scale: .*got None"),
        ({"key_frame": 1}, r"SamplingConfig\.key_frame: expected true or false, got 1"),
    ):
        with pytest.raises(SettingsError, match=message):
            recommended.replacing(entries)


def test_sampling_says_itself_in_a_line():
    assert str(SamplingConfig()) == "DDIM, 20 steps, guidance 7.5"
    whole = SamplingConfig(12, 2.0, 1.5, 0.25)
    assert str(whole) == "DDIM, 12 steps, guidance 2 (flow 1.5), flow from 0.25"
    anchored = SamplingConfig(anchor_end=0.9, key_frame=True)
    assert str(anchored) == f"{SamplingConfig()}, anchored to 0.9, from a key frame"
    assert str(SamplingConfig(key_frame=True)) == str(SamplingConfig())


def test_motion_strength_is_a_multiple_of_the_trained_motion():
    trained = TINY.flow_generator
    assert FlowSampling().motion(trained) is None
    motion = FlowSampling(motion_strength=2.5).motion(trained)
    assert motion.tolist() == pytest.approx([2.5 * trained.motion])
    assert FlowSampling(motion_strength=0.0).motion(trained).tolist() == [0.0]


def test_bundled_model_fits_fifty_megabytes():
    assert DEFAULT_CHECKPOINT.stat().st_size < 50e6


def test_both_stages_of_the_bundled_model_make_clips_of_one_length():
    """The motion of a clip is not given in fewer frames than that of a prompt."""
    bundled = read_config(DEFAULT_CHECKPOINT)
    assert (bundled.frames, bundled.flow_generator.frames) == (16, 16)


def test_full_size_stable_diffusion_takes_the_adapter():
    with torch.device("meta"):
        unet = modules.build_unet(SD15.unet)
    adapter = FlowAdapter(SD15.flow_adapter, device="meta")
    attention.attach_adapter(unet, adapter)
    tokens = torch.empty(2, 77, 256, device="meta")
    out = unet(
        torch.empty(2, 4, 16, 16, device="meta"),
        torch.zeros(2, device="meta"),
        torch.empty(2, 77, 768, device="meta"),
        cross_attention_kwargs={"flow_tokens": tokens},
    ).sample
    assert out.shape == (2, 4, 16, 16)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_untrained_adapter_changes_no_bit():
    torch.manual_seed(0)
    unet = modules.build_unet(SD15.unet).eval()
    x, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 77, 768)
    before = unet(x, t, prompt).sample
    adapter = FlowAdapter(SD15.flow_adapter)
    attention.attach_adapter(unet, adapter)
    tokens = adapter.encode(torch.randn(1, 3, 64, 64))
    after = unet(x, t, prompt, cross_attention_kwargs={"flow_tokens": tokens}).sample
    assert torch.equal(before, after)
