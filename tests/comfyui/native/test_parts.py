"""Parts of different checkpoints: what is told before they meet as tensors that don't fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_checkpoint import tiny_config, write_random_checkpoint

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def wide(rig, tmp_path_factory):
    """A checkpoint of 16 latent channels, as the bundled one; Encode Flow gives four."""
    config = tiny_config(flow_generator=None)
    config = dataclasses.replace(
        config,
        unet=dataclasses.replace(config.unet, in_channels=16),
        vae=dataclasses.replace(config.vae, latent_channels=16),
    )
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    return type(rig)(rig.pack, rig.nodes, write_random_checkpoint(path, config))


def decoders():
    """Core's nodes that decode."""
    import nodes

    tiles = {"tile_size": 64, "overlap": 0}
    return [
        lambda vae, latent: nodes.VAEDecode().decode(vae, latent)[0],
        lambda vae, latent: nodes.VAEDecodeTiled().decode(vae, latent, **tiles)[0],
    ]


def test_a_bypassed_sampler_is_named_by_the_decoder(wide):
    _, _, latent = wide.encode(wide.flow(2))
    with torch.inference_mode():
        for decode in decoders():
            with pytest.raises(
                ValueError, match=r"16 channels, got \(2, 4, 8, 8\)\. .*don't bypass the sampler"
            ):
                decode(wide.loaded.vae, latent)
            sampled = {"samples": torch.zeros(2, 16, 8, 8)}
            assert decode(wide.loaded.vae, sampled).shape == (2, 64, 64, 3)


def test_the_vae_is_cores(wide):
    import comfy.sd

    assert isinstance(wide.loaded.vae, comfy.sd.VAE)


def test_latents_of_another_vae_are_refused_by_each_sampler(wide):
    import comfy.sample

    positive, negative, latent = wide.encode(wide.flow(2))
    given = {"samples": latent["samples"] + 1}
    wanted = r"latents of 16 channels, as the MODEL has them, got \(2, 4, 8, 8\)\. .*with the VAE"
    with pytest.raises(ValueError, match=rf"^KSampler with Shared Noise \(S2DM\): .*{wanted}"):
        wide.sample((positive, negative, given))
    with pytest.raises(ValueError, match=wanted), torch.inference_mode():
        noise = torch.zeros(2, 4, 8, 8)
        arguments = (positive, negative, given["samples"])
        comfy.sample.sample(wide.loaded.model, noise, 2, 4.0, "ddim", "normal", *arguments)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_prompts_of_another_clip_are_refused(rig, side):
    prompt = [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]
    with pytest.raises(
        ValueError, match=r"prompts of width \d+, .*got \(1, 77, 768\)\. .*the CLIP"
    ):
        rig.sample(rig.encode(rig.flow(2), **{side: prompt}))


def test_flow_without_an_adapter_is_warned_of(rig, caplog):
    plain = rig.plain_model()
    rig.sample(rig.encode(rig.flow(2)), plain)
    assert "Add Apply Flow Adapter (S2DM)" in caplog.text
    caplog.clear()
    rig.sample(rig.encode(rig.flow(2)))
    positive, negative, latent = rig.prompt(), rig.prompt(""), {"samples": torch.zeros(2, 4, 8, 8)}
    rig.sample((positive, negative, latent), plain)
    assert "adapter" not in caplog.text
