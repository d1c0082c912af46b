"""Nodes that sample frames from one noise."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..s2dm.sector import NOISE_SHARING, NoiseSharing
from .native import noise as native
from .native.recommended import recommended
from .schema import (
    cfg_input,
    check_finite,
    check_given,
    named_errors,
    schema,
    seed_input,
    share_input,
)

_SEED = (
    "Seed of all noise. A single frame with the same seed and size starts from the same noise as "
    "the clip."
)


def _sharing_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "noise_sharing",
            options=list(NOISE_SHARING),
            default="shared",
            tooltip=(
                "shared: one noise for all frames, as in the paper; what the prompt leaves open "
                "changes little. independent: noise of its own for each frame. mixed: a blend."
            ),
        ),
        share_input(
            "share",
            0.5,
            "How much of the noise all frames share, in mixed only. 0: independent; 1: shared.",
            folded=True,
        ),
    ]


class SharedNoiseKSampler(io.ComfyNode):
    """KSampler with noise that the frames share, at the start and at every step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMSharedNoiseKSampler",
            display_name="KSampler with Shared Noise (S2DM)",
            category="s2dm/sampling",
            description=(
                "Samples all frames from the same noise, with any sampler, so that what the flow "
                "doesn't move changes little from frame to frame."
            ),
            search_aliases=["s2dm", "ksampler", "fixed noise", "consistent noise", "video sampler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model. It needs a flow adapter to follow flow."
                ),
                seed_input(_SEED),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip=(
                        "Sampling steps. 0: as many as the checkpoint recommends; without a "
                        "recommendation 20, as in the paper."
                    ),
                ),
                cfg_input(
                    0.0,
                    "Guidance scale: how closely to follow the prompt. 0: as the checkpoint "
                    "recommends; without a recommendation 7.5, as in the paper. 1: no guidance.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="ddim",
                    tooltip=(
                        "The sampler; ddim in the paper. With each of them all frames share the "
                        "noise."
                    ),
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="ddim_uniform",
                    tooltip="How the noise level falls over the steps.",
                ),
                io.Conditioning.Input("positive", tooltip="From Encode Flow."),
                io.Conditioning.Input("negative", tooltip="From Encode Flow."),
                io.Latent.Input("latent_image", tooltip="The frames to sample, from Encode Flow."),
                share_input(
                    "denoise",
                    1.0,
                    "1: starts from noise alone. Less keeps some of the latents that come in.",
                ),
                *_sharing_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="The clip, for VAE Decode."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float = 1.0,
        noise_sharing: str = "shared",
        share: float = 0.5,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(cfg=cfg, denoise=denoise, share=share)
            check_given(
                model=model, positive=positive, negative=negative, latent_image=latent_image
            )
        recommendation = recommended(model)
        steps = steps or recommendation.steps
        cfg = cfg or recommendation.guidance_scale
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        out = {**latent_image, "samples": samples}
        with named_errors(cls):
            sharing = NoiseSharing(noise_sharing, share)
            noise = native.SharedNoise(seed, sharing).generate_noise(out)
            sampler = native.SharedNoiseSampler(
                comfy.samplers.sampler_object(sampler_name), sharing
            )
            # Core's own, so that the sigmas are those of its KSampler for each name.
            sigmas = comfy.samplers.KSampler(
                model, steps, model.load_device, sampler_name, scheduler, denoise
            ).sigmas
            out["samples"] = comfy.sample.sample_custom(
                model,
                noise,
                cfg,
                sampler,
                sigmas,
                positive,
                negative,
                samples,
                noise_mask=latent_image.get("noise_mask"),
                callback=latent_preview.prepare_callback(model, steps),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
        return io.NodeOutput(out)


class SharedNoise(io.ComfyNode):
    """The initial noise, for core's custom samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMSharedNoise",
            display_name="Shared Noise (S2DM)",
            category="s2dm/sampling",
            description=(
                "Initial noise for SamplerCustomAdvanced that all frames share. For a sampler that "
                "also draws noise at its steps, add Shared-Noise Sampler."
            ),
            search_aliases=["s2dm", "random noise", "fixed noise", "consistent noise"],
            inputs=[seed_input(_SEED), *_sharing_inputs()],
            outputs=[
                io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")
            ],
        )

    @classmethod
    def execute(cls, seed: int, noise_sharing: str = "shared", share: float = 0.5) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(share=share)
            return io.NodeOutput(native.SharedNoise(seed, NoiseSharing(noise_sharing, share)))


class SharedNoiseSampler(io.ComfyNode):
    """The noise of the steps, for core's custom samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMSharedNoiseSampler",
            display_name="Shared-Noise Sampler (S2DM)",
            category="s2dm/sampling",
            description=(
                "Makes all frames share the noise that a sampler draws at its steps. Ancestral and "
                "SDE samplers draw such noise."
            ),
            search_aliases=["s2dm", "sampler", "ancestral", "sde", "fixed noise"],
            inputs=[
                io.Sampler.Input(
                    "sampler", tooltip="Any sampler, for example from KSamplerSelect."
                ),
                *_sharing_inputs(),
            ],
            outputs=[
                io.Sampler.Output(
                    "shared_sampler",
                    display_name="sampler",
                    tooltip="The same sampler with shared noise, for SamplerCustomAdvanced.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, sampler: Any, noise_sharing: str = "shared", share: float = 0.5
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(share=share)
            check_given(sampler=sampler)
            sharing = NoiseSharing(noise_sharing, share)
            return io.NodeOutput(native.SharedNoiseSampler(sampler, sharing))
