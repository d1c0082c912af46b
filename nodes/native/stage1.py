"""Stage 1 as a model of ComfyUI: the flow generator, sampled and looked after by core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_base import ModelType
from torch import Tensor, nn

from ...s2dm.flow import FlowField
from ...s2dm.flow.geometry import resample
from ...s2dm.models import (
    FlowGenerator,
    FlowGeneratorConfig,
    FlowSampling,
    LFDMConditions,
    RegionMotion,
    S2DMConfig,
    constrain,
    decode_flow,
    lfdm_times,
    sample_as_lfdm,
)
from ...s2dm.models.flow_generator import FLOW_CHANNELS
from ...s2dm.sector import seed_of_flow
from ..pictures import first_picture

MODEL_TYPES = {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}
MIN_FRAMES = 2

# DDIM without noise of its own is Euler's method, and core's ddim is its euler.
_SAMPLERS = {"dpmpp_2m": "dpmpp_2m", "ddim": "euler"}

_CONDITIONS = "s2dm_flow_generator"
"""Key of the network's conditions in a conditioning entry."""


class Stage1(NamedTuple):
    """What an S2DM_FLOW_GENERATOR socket carries.

    config: of the whole checkpoint.
    network: ε_φ, the flow generator.
    clip: reads the prompt for it.
    vae: its latents are the features of the reference frame.
    conditions: of LFDM's network in their place, an `LFDMConditions`. Then clip and vae may be
        missing.
    """

    config: S2DMConfig
    network: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP | None = None
    vae: comfy.sd.VAE | None = None
    conditions: comfy.model_patcher.ModelPatcher | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The networks that are stage 1's alone, by their parts."""
        found = {"flow_generator": self.network.model.diffusion_model.network}
        if self.conditions is not None:
            encoders = self.conditions.model
            found["region_motion"] = encoders.region_motion
            found["flow_text_encoder"] = encoders.text_encoder
        return found


class _Given(NamedTuple):
    """What the network is given: features of the frame, the prompt, and where nothing moves."""

    reference: Tensor
    text: Tensor | None
    still: Tensor | None = None


def load_network(
    config: FlowGeneratorConfig, state: dict[str, Tensor]
) -> comfy.model_patcher.ModelPatcher:
    """The flow generator as a model that core samples, loads and offloads."""
    model = _Model(config)
    model.diffusion_model.network.load_state_dict(state)
    management = comfy.model_management
    return Whole(model, management.get_torch_device(), management.unet_offload_device())


def load_conditions(module: LFDMConditions) -> comfy.model_patcher.ModelPatcher:
    """LFDM's encoders as a model that core loads and offloads."""
    management = comfy.model_management
    return Whole(module, management.text_encoder_device(), management.text_encoder_offload_device())


def load_regions(model: RegionMotion) -> comfy.model_patcher.ModelPatcher:
    """A region-motion model as one that core loads and offloads."""
    management = comfy.model_management
    return Whole(model, management.get_torch_device(), management.unet_offload_device())


def generate_flow(
    stage1: Stage1,
    reference: Tensor,
    prompt: str,
    num_frames: int,
    sampling: FlowSampling,
    seed: int,
    on_step: Callable[..., None] | None = None,
) -> FlowField:
    """A flow that fits a prompt and a reference frame.

    Args:
        stage1: from a checkpoint with a flow generator.
        reference: IMAGE (B, H, W, 1, 3 or 4) in [0, 1]; the first one counts, without alpha. The
            network sees it stretched to the checkpoint's resolution, because every pixel of the
            frame needs flow and half-frames don't depend on its shape.
        prompt: what happens; the null label if it is blank.
        num_frames: of the result, 2 or more. The network makes as many as it was trained on, and
            the flow is retimed.
        sampling: steps, guidance, sampler and motion strength.
        seed: of the noise. It may be that of the clip: stage 1 makes another one of it.
        on_step: core's sampling callback.

    Returns:
        A field of `num_frames` frames in the size of the reference.

    Raises:
        ValueError: an argument is out of its range, or the network lacks what it asks for.
    """
    config = stage1.config.flow_generator
    if num_frames < MIN_FRAMES:
        raise ValueError(
            f"expected at least {MIN_FRAMES} frames, got {num_frames}. A single frame has no "
            "motion: sample it from Encode Flow (S2DM) without a flow."
        )
    sampling.check(config, num_frames)
    given = _given(stage1, reference, prompt)
    known = {
        "reference": given.reference,
        "text": torch.zeros(1, config.text_dim),
        "keep_text": torch.tensor([False]),
    }
    if (motion := sampling.motion(config)) is not None:
        known["motion"] = motion
    unknown = dict(known)
    if given.text is not None:
        known |= {"text": given.text, "keep_text": torch.tensor([True])}
    shape = (1, config.frames, FLOW_CHANNELS, *config.size)
    generator = torch.Generator().manual_seed(seed_of_flow(seed))

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).transpose(1, 2).contiguous()

    noise = draw()
    network = stage1.network
    if sampling.sampler == "lfdm":
        sampler = _AsLFDM(config, sampling.steps, draw)
    else:
        sampler = comfy.samplers.ksampler(_SAMPLERS[sampling.sampler])
        network = _constrained(network, config)
    sample = comfy.sample.sample_custom(
        network,
        noise,
        sampling.guidance_scale,
        sampler,
        _sigmas(network.get_model_object("model_sampling"), sampling),
        [[None, {_CONDITIONS: known}]],
        [[None, {_CONDITIONS: unknown}]],
        torch.zeros_like(noise),
        callback=on_step,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    height, width = reference.shape[1:3]
    sample = sample[0].transpose(0, 1).cpu()
    return decode_flow(sample, config, height, width, given.still).retime(num_frames)


def _given(stage1: Stage1, image: Tensor, prompt: str) -> _Given:
    """The conditions from the first frame of an IMAGE and from the prompt."""
    frame = first_picture(image, "reference").contiguous()
    if stage1.conditions is not None:
        comfy.model_management.load_models_gpu([stage1.conditions])
        encoders = stage1.conditions.model
        return _Given(encoders.reference(frame), encoders.text(prompt), encoders.still(frame))
    frame = resample(frame, *stage1.config.resolution)
    latents = stage1.vae.encode(frame.movedim(1, -1)) * stage1.config.vae.scaling_factor
    return _Given(latents, embed(stage1.clip, prompt) if prompt.strip() else None)


def _constrained(
    network: comfy.model_patcher.ModelPatcher, config: FlowGeneratorConfig
) -> comfy.model_patcher.ModelPatcher:
    """A clone whose guesses of the clean clip pass through `constrain`."""

    # Not a method of the model: core copies these options deeply, with all that they hold.
    def constrained(arguments: dict[str, Any]) -> Tensor:
        return constrain(arguments["denoised"].transpose(1, 2), config).transpose(1, 2)

    network = network.clone()
    network.set_model_sampler_post_cfg_function(constrained)
    return network


class _AsLFDM(comfy.samplers.Sampler):
    """LFDM's own sampling, by core's model."""

    def __init__(self, config: FlowGeneratorConfig, steps: int, draw: Callable[[], Tensor]) -> None:
        self.config = config
        self.steps = steps
        self.draw = draw

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """As `comfy.samplers.Sampler.sample`; core's clips are x_t/√ᾱ, LFDM's x_t."""
        levels = model_wrap.inner_model.model_sampling.sigmas

        def seen(x_t: Tensor, time: int) -> tuple[Tensor, Tensor]:
            sigma = levels[time].to(x_t)
            scale = (sigma**2 + 1).sqrt()
            x = x_t * scale
            clean = model_wrap(x, sigma.expand(len(x)), **extra_args)
            return clean, (x_t - clean / scale) * scale / sigma

        def limited(clean: Tensor) -> Tensor:
            return constrain(clean.transpose(1, 2), self.config).transpose(1, 2)

        def told(number: int, clean: Tensor, x_t: Tensor) -> None:
            if callback is not None:
                callback(number, clean, x_t, self.steps)

        return sample_as_lfdm(
            seen,
            noise,
            self.config.schedule,
            self.steps,
            limited,
            lambda: self.draw().to(noise),
            told,
        )


def embed(clip: comfy.sd.CLIP, prompt: str) -> Tensor:
    """A prompt as the flow generator reads it: CLIP's state at its end, (1, text_dim)."""
    _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled="unprojected")
    return pooled


def _sigmas(model: comfy.model_sampling.ModelSamplingDiscrete, sampling: FlowSampling) -> Tensor:
    """Noise levels at timesteps spaced evenly back from the last one, and 0 ("trailing").

    Or those at which LFDM's sampling asks the network.
    """
    total, steps = len(model.sigmas), sampling.steps
    if sampling.sampler == "lfdm":
        times = torch.tensor(lfdm_times(total, steps))
    else:
        spaced = total - torch.arange(steps, dtype=torch.float64) * (total / steps)
        times = spaced.round().long() - 1
    return torch.cat([model.sigmas.cpu()[times], torch.zeros(1)])


class Whole(comfy.model_patcher.ModelPatcher):
    """Loads its model whole or not at all, because the layers don't cast their weights at use.

    The published sizes take 171 MB, those of the bundled checkpoint a tenth of it.
    """

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        super().load(device_to, 0, force_patch_weights, full_load=True)

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0


class _ModelConfig(comfy.supported_models_base.BASE):
    """What core asks of any model: no U-Net of its own, and latents that are flow."""

    class latent_format(comfy.latent_formats.LatentFormat):  # noqa: N801 (core's name)
        latent_channels = FLOW_CHANNELS
        latent_dimensions = 3

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 (core's type)
    memory_usage_factor = 0.25  # by measurement: 10 KB a place and frame at the published sizes


class _Model(comfy.model_base.BaseModel):
    """The flow generator behind core's interface, in float32: it is small, and exact is cheap."""

    def __init__(self, config: FlowGeneratorConfig) -> None:
        schedule = config.schedule
        settings = _ModelConfig({"disable_unet_model_creation": True})
        settings.sampling_settings = {"timesteps": schedule.steps}
        super().__init__(settings, MODEL_TYPES[schedule.prediction_type])
        self.diffusion_model = _Axes(config)
        alphas = torch.cumprod(1 - schedule.betas(), dim=0)
        self.model_sampling.set_sigmas(((1 - alphas) / alphas).sqrt())
        self.eval().requires_grad_(False)

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        """Conditions of one entry as core batches them."""
        return {
            name: comfy.conds.CONDRegular(value.to(kwargs["device"]))
            for name, value in kwargs[_CONDITIONS].items()
        }


class _Axes(nn.Module):
    """Core has the channels of a clip before its frames, the flow generator after them."""

    dtype = torch.float32

    def __init__(self, config: FlowGeneratorConfig) -> None:
        super().__init__()
        self.network = FlowGenerator(config)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        *,
        reference: Tensor,
        text: Tensor,
        keep_text: Tensor,
        motion: Tensor | None = None,
    ) -> Tensor:
        """(B, 3, N, h, w) -> (B, 3, N, h, w). Core passes `keep_text` as numbers."""
        prediction = self.network(
            x.transpose(1, 2), timesteps, reference, text, motion, keep_text=keep_text.bool()
        )
        return prediction.transpose(1, 2)
