"""A photo moved by models of the sizes that people have, with random weights."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from full_size import autoencoder, fill_at_random, photo

from s2dm.flow import FlowField
from s2dm.pipelines import animate

FRAMES = 3
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}


def stable_diffusion():
    """Stable Diffusion 1.5 without its text encoder, and text states of its width."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    unet = fill_at_random(unet.to_empty(device="cpu"))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        unet=unet, vae=autoencoder(), scheduler=DDIMScheduler(**SCHEDULE),
        requires_safety_checker=False, **nothing,
    )  # fmt: skip
    return pipeline, {"prompt_embeds": torch.randn(1, 77, 768)}


def stable_diffusion_xl():
    """Stable Diffusion XL, narrow: no attention at the finest level, then 2 and 10 layers."""
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        cross_attention_dim=2048,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025,
    )
    nothing = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "feature_extractor"),
    )
    pipeline = StableDiffusionXLPipeline(
        unet=fill_at_random(unet), vae=fill_at_random(vae), scheduler=DDIMScheduler(**SCHEDULE),
        image_encoder=None, add_watermarker=False, **nothing,
    )  # fmt: skip
    states = {
        "prompt_embeds": torch.randn(1, 77, 2048),
        "pooled_prompt_embeds": torch.zeros(1, 1280),
    }
    return pipeline, states


def to_the_right(height, width):
    """The whole picture slides by 8 pixels a frame; what comes in was not seen."""
    displacement, occlusion = (
        torch.zeros(FRAMES, 2, height, width),
        torch.zeros(FRAMES, 1, height, width),
    )
    for number in range(FRAMES):
        displacement[number, 0] = -8.0 * number
        occlusion[number, ..., : 8 * number] = 1
    return FlowField(displacement, occlusion)


@pytest.mark.slow
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_frame_1_is_the_photo_to_the_error_of_the_autoencoder_and_the_others_move(make):
    torch.manual_seed(0)
    pipeline, states = make()
    pipeline.set_progress_bar_config(disable=True)
    picture = photo()
    clip = animate(
        pipeline, None, picture, to_the_right(128, 128), num_inference_steps=2, guidance_scale=1.0,
        output_type="pt", **states,
    ).images  # fmt: skip
    assert clip.shape == (FRAMES, 3, 128, 128) and clip.isfinite().all()
    vae = pipeline.vae
    with torch.no_grad():
        latents = vae.encode(picture[None] * 2 - 1).latent_dist.mode()
        passed = (vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1)
    assert passed.std() > 0.01  # not one grey
    assert (clip[0] - passed).abs().max() < 0.02
    assert relative(clip[-1], clip[0]) > 0.02
