"""The anchor on models that are no Stable Diffusion 1.x, in core's own classes, tiny and random."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from compare import relative
from core_models import random_model, sdxl

pytestmark = pytest.mark.comfyui

FRAMES = 3


class Pooling:
    """Stands in for a VAE: means over cells of 8 pixels, in so many channels and dimensions."""

    def __init__(self, channels, video=False):
        self.channels = channels
        self.video = video

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        """(N, H, W, 3); a VAE of videos takes several pictures for one of them."""
        assert len(pixels) == 1
        latents = F.avg_pool2d(pixels.movedim(-1, 1), 8)
        latents = latents.repeat(1, self.channels, 1, 1)[:, : self.channels]
        return latents[:, :, None] if self.video else latents


def flux():
    import comfy.ldm.flux.model as core
    import comfy.supported_models

    settings = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 1280,
        "context_in_dim": 64,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    if "txt_ids_dims" in inspect.signature(core.FluxParams).parameters:
        settings["txt_ids_dims"] = []
    return random_model(comfy.supported_models.Flux, settings)


def qwen():
    import comfy.supported_models

    return random_model(
        comfy.supported_models.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "axes_dims_rope": (8, 12, 12),
        },
    )


MODELS = {
    "sdxl": (sdxl, Pooling(4), (4, 8, 8)),
    "flux": (flux, Pooling(16), (16, 8, 8)),
    "qwen": (qwen, Pooling(16, video=True), (16, 1, 8, 8)),
}


@pytest.fixture(scope="module", params=MODELS)
def kind(request, rig):
    make, vae, shape = MODELS[request.param]
    return request.param, make(), vae, shape


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))


def sample(rig, model, shape, frames=FRAMES, **inputs):
    generator = torch.Generator().manual_seed(1)
    prompts = [
        [[torch.randn(1, 7, 64, generator=generator), {"pooled_output": torch.zeros(1, 1280)}]]
        for _ in range(2)
    ]
    inputs = {"sampler_name": "euler", "scheduler": "simple", "steps": 4, **inputs}
    return rig.sample((*prompts, {"samples": torch.zeros(frames, *shape)}), model, **inputs)


def anchored(rig, model, vae, picture, flow, **inputs):
    return rig.run(
        "S2DMAnchorToReference", model=model, vae=vae, reference=picture, flow=flow, **inputs
    )[0]


def test_frame_1_is_the_picture(rig, kind, picture):
    _, model, vae, shape = kind
    flow = rig.flow(FRAMES)
    patched = anchored(rig, model, vae, picture, flow)
    clip = sample(rig, patched, shape)
    assert clip.shape == (FRAMES, *shape)
    assert relative(clip[:1], vae.encode(picture)) < 1e-3
    assert relative(clip[1:], vae.encode(picture).expand_as(clip[1:])) > 1e-3
    still = anchored(rig, model, vae, picture, rig.equal_flow(FRAMES))
    clip = sample(rig, still, shape)
    assert torch.equal(clip, clip[:1].expand_as(clip))


def test_chunks_are_exact(rig, kind, picture, monkeypatch):
    _, model, vae, shape = kind
    patched = anchored(rig, model, vae, picture, rig.flow(FRAMES), reference_attention="on")
    chunks = rig.module("nodes.native.chunks")
    whole = sample(rig, patched, shape)
    monkeypatch.setattr(chunks, "frames_at_once", lambda *args: 1)
    assert relative(sample(rig, patched, shape), whole) < 1e-5


def test_reference_attention(rig, kind, picture, caplog):
    """Of Stable Diffusion's U-Nets; others say that it does nothing."""
    name, model, vae, shape = kind

    def clip(reference_attention):
        patched = anchored(
            rig,
            model,
            vae,
            picture,
            rig.flow(FRAMES),
            strength=0.01,
            reference_attention=reference_attention,
        )
        return sample(rig, patched, shape, noise_sharing="independent")

    if name == "sdxl":
        assert relative(clip("on")[1:], clip("off")[1:]) > 1e-6
        assert relative(clip("on")[:1], clip("off")[:1]) < 1e-6
    else:
        assert torch.equal(clip("on"), clip("off"))
        assert "no self-attention of Stable Diffusion's kind" in caplog.text


def test_latents_of_a_video_are_refused(rig, picture):
    make, vae, _ = MODELS["qwen"]
    model = anchored(rig, make(), vae, picture, rig.flow(1))
    with pytest.raises(ValueError, match="expected latents of pictures"):
        sample(rig, model, (16, 3, 8, 8), frames=1)
