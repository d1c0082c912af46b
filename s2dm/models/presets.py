"""Named configurations: Stable Diffusion 1.5 and the small model of the puppets."""

from __future__ import annotations

from .config.adapter import FlowAdapterConfig
from .config.checkpoint import S2DMConfig
from .config.networks import TextEncoderConfig, UNetConfig, VAEConfig
from .config.sampling import ScheduleConfig
from .config.stage1 import FlowGeneratorConfig, RegionMotionConfig

SD15 = S2DMConfig(
    unet=UNetConfig(),
    vae=VAEConfig(),
    text_encoder=TextEncoderConfig(),
    flow_adapter=FlowAdapterConfig(),
    tokenizer={"kind": "clip"},
)
"""Stable Diffusion 1.5 with a flow adapter on its 16 cross-attention layers."""

_PUPPETS_UNET = UNetConfig(
    in_channels=16,
    model_channels=64,
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    attention_levels=(True, True, True),
    num_heads=2,
    context_dim=128,
)

PUPPETS = S2DMConfig(
    unet=_PUPPETS_UNET,
    # An arm is as wide as a cell of latents: four numbers don't say how it bends, sixteen do.
    # GroupNorm has 32 groups: with 32 channels each is normalised alone, which wipes out the
    # colour of a wall. 64 channels keep it.
    vae=VAEConfig(channels=64, channel_mult=(1, 1, 2, 2), num_res_blocks=1, latent_channels=16),
    text_encoder=TextEncoderConfig(
        hidden_size=128,
        layers=3,
        heads=4,
        intermediate_size=512,
        vocab_size=1000,
        bos_token_id=998,
        eos_token_id=999,
    ),
    flow_adapter=FlowAdapterConfig.for_unet(_PUPPETS_UNET),
    flow_generator=FlowGeneratorConfig(
        reference_channels=16,
        text_dim=128,
        model_channels=48,
        channel_mult=(1, 2, 4),
        num_heads=2,
        norm="frame",
        upsample="nearest",
        patch=2,
        null_reference="learned",
        null_text="learned",
        motion_strength=True,
        frames=16,
        schedule=ScheduleConfig(beta_schedule="cosine", prediction_type="v_prediction"),
        threshold=0.0,
    ),
    # Prompt and flow decide most where there is much noise. There the error of ε hardly counts
    # (at t = 950 it is 120 times smaller than that of the picture), that of v does.
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)
"""The model that is trained on puppets and ships with the pack.

The tokenizer is trained on the captions: it sets the vocabulary size and the two special ids.
"""

LFDM = S2DMConfig(
    flow_generator=FlowGeneratorConfig(null_reference="learned", null_text="learned", frames=16)
)
"""A flow generator of LFDM's size (arXiv 2303.13744), to train on latents and displacements."""

FLOW_GENERATORS = {"lfdm": LFDM.flow_generator, "puppets": PUPPETS.flow_generator}
"""Sizes of flow generators: LFDM's, for Stable Diffusion, and a small one for CPUs."""

REGION_MOTION = {
    "puppets": RegionMotionConfig(
        levels=4,
        width=16,
        flow_width=32,
        max_width=128,
        map_padding=3,
        frame_width=8,
        frame_blocks=2,
    ),
    "lfdm": RegionMotionConfig(),
}
"""Sizes of region-motion models: a small one for CPUs, and LFDM's."""
