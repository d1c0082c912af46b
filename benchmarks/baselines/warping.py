"""Warping, as LFDM (arXiv 2303.13744) makes a clip of a picture and a flow.

Stage 1 makes the flow, which moves the latents of the reference frame and blanks what that frame
doesn't show; the autoencoder decodes them. The reference frame, the flow and their noise are those
of our two stages, so that the two differ in the last step alone. LFDM trains a decoder that paints
what was hidden. Here there is none: holes stay, and nothing is learned but what S2DM has anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2dm.evaluation.clip_metrics import still_region
from s2dm.evaluation.modes import ClipSampler, Made, Variant
from s2dm.flow import FlowField
from s2dm.models import FlowSampling, decode_flow
from s2dm.pipelines import TextToVideoPipeline, embed_prompts, flow_scheduler, generate_flow
from s2dm.sector import seed_of_flow


def warp_latents(reference: Tensor, flow: FlowField) -> Tensor:
    """Latents (1,C,h,w) of frame 1, moved as a flow of any size says: (N,C,h,w), 0 where hidden."""
    flow = flow.resize(*reference.shape[2:])
    return flow.warp(reference) * (1 - flow.occlusion.to(reference))


def imagine_flow(
    pipeline: TextToVideoPipeline, prompt: str, reference: Tensor, sampling: FlowSampling, seed: int
) -> FlowField:
    """The flow that the two-stage pipeline makes for a seed, of the size that the VAE decodes to.

    reference: latents of the reference frame (1,C,h,w).
    """
    network = pipeline.flow_generator.network
    sample = generate_flow(
        network,
        flow_scheduler(network.config.schedule),
        embed_prompts(pipeline.text_encoder, pipeline.tokenizer, [prompt]),
        reference,
        sampling.steps,
        sampling.guidance_scale,
        torch.Generator().manual_seed(seed_of_flow(seed)),
    )
    height, width = (side * pipeline.vae_factor for side in reference.shape[2:])
    return decode_flow(sample[0].cpu(), network.config, height, width)


def warping(generator: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    """The mode: a clip from the caption alone."""
    count, height, width = clip.flow.num_frames, clip.flow.height, clip.flow.width
    pipeline, caption = generator.pipeline, clip.caption
    still = FlowField.zeros(1, height, width)
    reference = generator.follow(caption, still, variant, seed, output_type="latent")
    flow = imagine_flow(pipeline, caption, reference, generator.flow_sampling, seed).retime(count)
    frames = pipeline.decode_latents(warp_latents(reference, flow), generator.chunk_size)
    # Sizes that are no whole number of latent cells are made a little larger.
    flow = flow.crop(height, width)
    return Made(frames[..., :height, :width], flow, still_region(flow))
