"""Anchored rays with pipelines that know nothing of S2DM, on tiny models with random weights."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from s2dm.flow import FlowField
from s2dm.pipelines import animate

BLOCKS = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "in_channels": 4,
    "out_channels": 4,
}


def tiny_pipeline(sdxl: bool = False, prediction: str = "epsilon"):
    torch.manual_seed(0)
    more = {}
    if sdxl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
            "transformer_layers_per_block": (1, 1),
        }
    unet = UNet2DConditionModel(**BLOCKS, **UNET, **more)
    down = ("DownEncoderBlock2D",) * 2
    up = ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(**BLOCKS, down_block_types=down, up_block_types=up)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    parts = {"vae": vae.eval(), "unet": unet.eval(), "scheduler": scheduler}
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
    if sdxl:
        others = dict.fromkeys(("text_encoder_2", "tokenizer_2", "image_encoder"))
        pipeline = StableDiffusionXLPipeline(**parts, **nothing, **others, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, **nothing, safety_checker=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told(pipeline) -> dict:
    """Text states in place of a prompt, and a call that takes little time."""
    generator = torch.Generator().manual_seed(3)

    def states(*shape):
        return torch.randn(shape, generator=generator)

    options = {"prompt_embeds": states(1, 5, 12), "negative_prompt_embeds": states(1, 5, 12)}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        options |= {"pooled_prompt_embeds": states(1, 10)}
        options |= {"negative_pooled_prompt_embeds": states(1, 10)}
    return options | {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1}


def picture(size=(32, 32)):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(4))


def sliding_flow(frames=5, size=32) -> FlowField:
    displacement = torch.zeros(frames, 2, size, size)
    displacement[:, 0, :, : size // 2] = -torch.arange(frames).view(-1, 1, 1) * 2.0
    return FlowField(displacement, torch.zeros(frames, 1, size, size))


def latents(pipeline, flow=None, reference=None, **options):
    reference = picture() if reference is None else reference
    flow = sliding_flow() if flow is None else flow
    options = told(pipeline) | options
    return animate(pipeline, None, reference, flow, output_type="latent", **options).images


def encoded(pipeline, reference):
    with torch.no_grad():
        mode = pipeline.vae.encode(reference[None] * 2 - 1).latent_dist.mode()
    return mode * pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_frame_1_is_the_picture_and_so_is_every_frame_of_a_clip_that_stands_still(sdxl, prediction):
    pipeline = tiny_pipeline(sdxl, prediction)
    clip = latents(pipeline)
    assert relative(clip[:1], encoded(pipeline, picture())) < 1e-4
    assert relative(clip[-1], clip[0]) > 1e-2  # it moves
    still = latents(pipeline, FlowField.zeros(3, 32, 32))
    assert relative(still, encoded(pipeline, picture()).expand_as(still)) < 1e-4


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_change_nothing(chunk_size):
    pipeline = tiny_pipeline(sdxl=True)
    whole = latents(pipeline, chunk_size=5)
    assert relative(latents(pipeline, chunk_size=chunk_size), whole) < 1e-5


def test_the_pipeline_stays_as_it_is_even_after_an_error():
    pipeline = tiny_pipeline()
    unet, processors = pipeline.unet, dict(pipeline.unet.attn_processors)
    latents(pipeline)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(pipeline, callback_on_step_end=stop)
    assert pipeline.unet is unet
    assert pipeline.unet.attn_processors == processors


def test_without_strength_and_attention_it_is_the_plain_pipeline_on_shared_noise():
    pipeline = tiny_pipeline()
    clip = latents(pipeline, strength=0.0, reference_attention=False)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    options = told(pipeline)
    options.pop("seed")
    plain = pipeline(latents=noise, output_type="latent", **options).images
    assert relative(clip, plain.expand_as(clip)) < 1e-4


def test_reference_attention_matters_and_so_does_the_end():
    pipeline = tiny_pipeline()
    clip = latents(pipeline)
    assert relative(latents(pipeline, reference_attention=False), clip) > 1e-4
    assert relative(latents(pipeline, anchor_end=0.3), clip) > 1e-2


def test_a_sampler_with_noise_of_its_own_shares_it():
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    still = latents(pipeline, FlowField.zeros(3, 32, 32), strength=0.0)
    assert (still - still[:1]).abs().max() < 1e-4 * still.std()


def test_what_does_not_fit_is_refused():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=r"multiples of 2 pixels, got 31x32\. .*resize\(32, 32\)"):
        latents(pipeline, FlowField.zeros(2, 32, 31))
    pipeline.unet = None
    with pytest.raises(ValueError, match="Expected a pipeline with a U-Net"):
        animate(pipeline, "a cat", picture(), FlowField.zeros(2, 32, 32))
