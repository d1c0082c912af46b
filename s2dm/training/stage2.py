"""Train stage 2: the denoiser ε_θ with its flow adapter, by the shared-noise loss (Eq. 11).

From random weights (the small bundled model, text encoder included) or from a checkpoint such as
Stable Diffusion 1.5, whose text encoder then stays frozen.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..flow import FlowField, flow_to_image
from ..models.build import (
    attach_adapter,
    build_flow_adapter,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from ..models.config import FlowAdapterConfig, S2DMConfig
from ..models.tokenizer import train_tokenizer, with_tokenizer
from ..sector import NOISE_SHARING, alphas_cumprod, draw_noise, guide, sample, sector_loss
from .cache import CONDITION_SIZE, ClipCache, build_clip_cache, clip_latents
from .config import TrainingConfig, TrainingConfigError
from .cpu import speed_up
from .datasets import build_dataset, pixels
from .loop import Progress, TrainingLoop, make_accelerator
from .models import (
    load_model,
    load_text_encoder,
    load_vae,
    preset,
    save_model,
    tokenize,
)
from .sheets import save_sheet
from .vae import cache_root

logger = logging.getLogger(__name__)

PARTS = ("unet", "flow_adapter", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class Stage2TrainingConfig(TrainingConfig):
    """Settings of the stage-2 trainer.

    Start: ``checkpoint`` (a file with a U-Net and a text encoder; parts it lacks are new) or else
    random weights in the sizes of ``preset``. ``vae`` and ``text_encoder`` are files to take the
    VAE, and the text encoder with its tokenizer, from if they are not the checkpoint's. ``train``
    names the parts that learn.

    A batch is ``clips`` clips with ``clip_frames`` frames each, drawn from the clip; with
    probability ``first_frame`` one of them is frame 1, which the flow starts from. The
    labels of a clip are replaced by null labels with fixed probabilities: ``both_null`` for text
    and flow together, which guidance starts from, ``text_null`` and ``flow_null`` for one of them
    alone. ``adapter_gain`` is the initial size of the adapter's projections: 0 keeps a pretrained
    U-Net as it is at the start, 1 lets a new one learn sooner.

    ``sampling`` is what the checkpoint is to recommend, entries of ``SamplingConfig`` in place of
    the start's; ``sample_steps`` and ``guidance_scale`` are those of the sample sheets.
    """

    output: str = "runs/stage2"
    preset: str = "puppets"
    checkpoint: str = ""
    vae: str = ""
    text_encoder: str = ""
    fusion: str = "channel"
    train: tuple[str, ...] = PARTS
    adapter_gain: float = 0.0
    clips: int = 16
    clip_frames: int = 4
    first_frame: float = 0.25
    both_null: float = 0.1
    text_null: float = 0.05
    flow_null: float = 0.05
    noise_sharing: str = "shared"
    noise_share: float = 0.5
    gradient_checkpointing: bool = False
    validation_clips: int = 4
    sample_frames: int = 8
    sample_steps: int = 20
    guidance_scale: float = 7.5
    sampling: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_sharing not in NOISE_SHARING:
            raise TrainingConfigError(
                f"noise_sharing must be one of {', '.join(NOISE_SHARING)}, "
                f"got {self.noise_sharing!r}."
            )
        unknown = sorted(set(self.train) - set(PARTS))
        if unknown or not self.train:
            raise TrainingConfigError(
                f"train must name some of {', '.join(PARTS)}, got {list(self.train)}."
            )


class Stage2Model(nn.Module):
    """U-Net, flow adapter and text encoder with the loss of Eq. 11, as the loop wants it."""

    def __init__(
        self, unet: nn.Module, flow_adapter: nn.Module, text_encoder: nn.Module, config: S2DMConfig
    ) -> None:
        super().__init__()
        self.unet = unet
        self.flow_adapter = flow_adapter
        self.text_encoder = text_encoder
        schedule = config.schedule
        self.prediction_type = schedule.prediction_type
        alpha_bars = alphas_cumprod(
            schedule.steps, schedule.beta_start, schedule.beta_end, schedule.beta_schedule
        )
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)
        attach_adapter(unet, flow_adapter)

    def flow_tokens(self, conditions: Tensor, null: Tensor) -> Tensor:
        """Conditions (M,3,88,56) to tokens (M,77,d); the learned null label where ``null`` (M,)."""
        tokens = self.flow_adapter.encode(conditions)
        nothing = self.flow_adapter.null_tokens(len(tokens)).to(tokens.dtype)
        return torch.where(null[:, None, None], nothing, tokens)

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor, flow: Tensor) -> Tensor:
        """The U-Net with text states (M,L,c) and flow tokens (M,77,d) bound to M latents."""
        return self.unet(
            latents, timesteps, text, cross_attention_kwargs={"flow_tokens": flow}
        ).sample

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Token ids (B,77) to the states (B,77,c) that cross-attention reads."""
        return self.text_encoder(token_ids).last_hidden_state

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of :meth:`Stage2Task.batch`; a clip's frames share text, t and null labels."""
        latents, conditions = batch["latents"], batch["conditions"]
        frames = latents.shape[1]
        text = self.encode_text(batch["token_ids"]).repeat_interleave(frames, 0)
        null = batch["flow_null"].repeat_interleave(frames)
        flow = self.flow_tokens(conditions.flatten(0, 1), null)

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            return self.predict(x_t, timesteps, text, flow)

        loss = sector_loss(
            predict,
            latents,
            batch["noise"],
            batch["timesteps"],
            self.alpha_bars,
            self.prediction_type,
        )
        return {"loss": loss}


class Stage2Task:
    """What the loop needs to train stage 2."""

    def __init__(
        self,
        config: Stage2TrainingConfig,
        model_config: S2DMConfig,
        model: Stage2Model,
        vae: nn.Module,
        tokenizer: Any,
        clips: ClipCache,
        latents: np.ndarray,
        others: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.others = others or {}
        self.model = model
        self.vae = vae
        self.clips = clips
        self.latents = latents
        self.tokenizer = tokenizer
        self.token_ids = tokenize(tokenizer, [*clips.captions, ""], model_config)
        self.validation = self._validation()

    def compile(self) -> None:
        self.model.unet.compile(dynamic=False)
        self.model.flow_adapter.encoder.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        config = self.config
        steps = self.model_config.schedule.steps
        chosen = torch.randint(len(self.clips), (config.clips,), generator=generator)
        # Drawn independently, both would be null in one clip of a hundred, too few to learn it.
        draw = torch.rand(config.clips, generator=generator)
        both_null = draw < config.both_null
        one_null = config.both_null + config.text_null
        text_null = draw < one_null
        flow_null = both_null | ((draw >= one_null) & (draw < one_null + config.flow_null))
        # One t a clip, drawn in strata over the batch: the same distribution, less variance.
        strata = torch.randperm(config.clips, generator=generator)
        where = (strata + torch.rand(config.clips, generator=generator)) / config.clips
        timesteps = (where * steps).long().clamp(max=steps - 1)
        latents, conditions, noise = [], [], []
        for clip in chosen.tolist():
            frames = self._frames(generator)
            latents.append(torch.from_numpy(self.latents[clip, frames].astype(np.float32)))
            conditions.append(
                torch.from_numpy(self.clips.conditions[clip, frames].astype(np.float32))
            )
            noise.append(
                draw_noise(
                    len(frames),
                    self.latents.shape[2:],
                    generator,
                    config.noise_sharing,
                    config.noise_share,
                )
            )
        empty = len(self.token_ids) - 1
        values = {
            "latents": torch.stack(latents),
            "conditions": torch.stack(conditions),
            "noise": torch.stack(noise),
            "token_ids": self.token_ids[torch.where(text_null, empty, chosen)],
            "flow_null": flow_null,
            "timesteps": timesteps,
        }
        return {key: value.to(device) for key, value in values.items()}

    def _frames(self, generator: torch.Generator) -> list[int]:
        """Distinct frame numbers of a clip; the first may be frame 1 of the paper, index 0."""
        count = self.latents.shape[1]
        size = min(self.config.clip_frames, count)
        others = (1 + torch.randperm(count - 1, generator=generator)).tolist()
        if size == count or torch.rand((), generator=generator) < self.config.first_frame:
            others.insert(0, 0)
        return others[:size]

    def _validation(self) -> list[Any]:
        data = build_dataset(self.config.data, self.config.data.validation_split)
        count = min(self.config.validation_clips, len(data))
        chosen = torch.linspace(0, len(data) - 1, count).long().tolist()
        clips = []
        for index in chosen:
            clip = data[index]
            every = torch.linspace(0, len(clip.frames) - 1, self.config.sample_frames)
            keep = every.round().long().unique()
            clips.append(
                {
                    "frames": pixels(clip.frames)[keep],
                    "flow": clip.flow.select(keep.tolist()),
                    "caption": clip.caption,
                }
            )
        return clips

    def sample(self, model: Stage2Model, path: Path) -> dict[str, float]:
        """For each held-out clip: true frames, flow, frames generated from caption and flow.

        The figure is the distance of generated to true frames where the flow says that something
        moves, which also holds the difference of two persons with one caption: compare it over
        time, not with anything else.
        """
        rows, errors = [], []
        for number, clip in enumerate(self.validation):
            flow: FlowField = clip["flow"]
            generated = generate(
                model,
                self.vae,
                self.tokenizer,
                self.model_config,
                clip["caption"],
                flow,
                step_generator_for(number),
                self.config.sample_steps,
                self.config.guidance_scale,
                self.config.noise_sharing,
                self.config.noise_share,
            )
            rows += [clip["frames"], flow_to_image(flow), generated]
            errors.append((generated - clip["frames"]).abs().mean())
        save_sheet(path, rows)
        return {"sample_error": float(torch.stack(errors).mean())}

    def export(self, model: Stage2Model, path: Path) -> None:
        """Write the whole checkpoint, with the flow generator as the start had it, if any."""
        parts = {
            "unet": model.unet,
            "text_encoder": model.text_encoder,
            "vae": self.vae,
            "flow_adapter": model.flow_adapter,
        }
        save_model(path.with_suffix(".safetensors"), self.model_config, parts, self.others)


def step_generator_for(number: int) -> torch.Generator:
    """The generator of the noise of sample ``number``, the same at every sheet."""
    return torch.Generator().manual_seed(1000 + number)


@torch.no_grad()
def generate(
    model: Stage2Model,
    vae: nn.Module,
    tokenizer: Any,
    config: S2DMConfig,
    caption: str,
    flow: FlowField,
    generator: torch.Generator,
    steps: int = 20,
    guidance_scale: float = 7.5,
    sharing: str = "shared",
    share: float = 0.5,
) -> Tensor:
    """Frames (N,3,H,W) in [0,1] for a caption and a flow, by DDIM as both engines run it."""
    from diffusers import DDIMScheduler

    schedule = config.schedule
    scheduler = DDIMScheduler(
        schedule.steps,
        schedule.beta_start,
        schedule.beta_end,
        schedule.beta_schedule,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=schedule.prediction_type,
        timestep_spacing="leading",
    )
    device = next(model.parameters()).device
    frames = len(flow)
    text = model.encode_text(tokenize(tokenizer, ["", caption], config).to(device))
    text = text.repeat_interleave(frames, 0)
    conditions = flow.condition(*CONDITION_SIZE).to(device).repeat(2, 1, 1, 1)
    null = torch.arange(2 * frames, device=device) < frames
    tokens = model.flow_tokens(conditions, null)

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        times = timestep.expand(2 * frames)
        both = model.predict(latents.repeat(2, 1, 1, 1), times, text, tokens)
        return guide(*both.float().chunk(2), guidance_scale)

    factor = config.vae.factor
    shape = (config.unet.in_channels, flow.height // factor, flow.width // factor)
    noise = draw_noise(frames, shape, generator, sharing, share).to(device)
    latents = sample(denoise, scheduler, noise, steps, generator, sharing, share)
    pictures = vae.decode(latents / config.vae.scaling_factor).sample
    return ((pictures.float() + 1) / 2).clamp(0, 1).cpu()


def build_stage2_task(config: Stage2TrainingConfig, device: torch.device) -> Stage2Task:
    """Prepare data, latents and model for ``config``."""
    clips = build_clip_cache(cache_root(config), config.data, workers=config.workers)
    model_config, states = _start(config, clips.captions)
    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    unet = build_unet(model_config.unet, states.get("unet"))
    adapter = build_flow_adapter(model_config.flow_adapter, states.get("flow_adapter"))
    text_encoder = build_text_encoder(model_config.text_encoder, states.get("text_encoder"))
    vae = build_vae(model_config.vae, states["vae"]).requires_grad_(False).eval().to(device)
    if device.type == "cpu":
        speed_up(vae)
    if "flow_adapter" not in states and config.adapter_gain > 0:
        for layer in adapter.layers.values():
            for projection in layer.values():
                nn.init.xavier_uniform_(projection.weight, config.adapter_gain)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    model = Stage2Model(unet, adapter, text_encoder, model_config)
    for part in PARTS:
        getattr(model, part).requires_grad_(part in config.train)
    model.unet.to(memory_format=torch.channels_last)

    half = config.mixed_precision == "bf16"
    latents = clip_latents(clips, vae, model_config.vae.scaling_factor, device, half)
    tokenizer = build_tokenizer(model_config)
    others = {name: state for name, state in states.items() if name == "flow_generator"}
    return Stage2Task(config, model_config, model, vae, tokenizer, clips, latents, others)


def _start(
    config: Stage2TrainingConfig, captions: list[str]
) -> tuple[S2DMConfig, dict[str, dict[str, Tensor]]]:
    """The model's config and the weights that exist already, by part."""
    if config.checkpoint:
        model_config, states = load_model(config.checkpoint)
    else:
        model_config, states = preset(config.preset), {}
        model_config = dataclasses.replace(model_config, flow_generator=None)
        if model_config.tokenizer is None and not config.text_encoder:
            spec = train_tokenizer(captions, model_config.text_encoder.vocab_size)
            model_config = with_tokenizer(model_config, spec)
    if config.text_encoder:
        read, states["text_encoder"] = load_text_encoder(config.text_encoder)
        model_config = dataclasses.replace(
            model_config, text_encoder=read.text_encoder, tokenizer=read.tokenizer
        )
    if config.vae:
        vae_config, states["vae"] = load_vae(config.vae)
        model_config = dataclasses.replace(model_config, vae=vae_config)
    if "vae" not in states:
        raise TrainingConfigError(
            "stage 2 needs a trained VAE: set vae to a file that holds one, for example the "
            "export of the VAE trainer."
        )
    if "flow_adapter" not in states:
        adapter = FlowAdapterConfig.for_unet(model_config.unet, fusion=config.fusion)
        model_config = dataclasses.replace(model_config, flow_adapter=adapter)
    model_config = model_config.recommending(config.sampling)
    model_config = dataclasses.replace(
        model_config,
        resolution=(config.data.size, config.data.size),
        frames=config.data.frames,
        noise_sharing=config.noise_sharing,
        noise_share=config.noise_share if config.noise_sharing == "mixed" else 1.0,
        data=config.description or model_config.data,
        licence=config.licence or model_config.licence,
    )
    return model_config, states


def train_stage2(config: Stage2TrainingConfig) -> Progress:
    """Train stage 2 as ``config`` says, or go on with the run in its folder.

    The folder's ``export.safetensors`` is the whole checkpoint with averaged weights, as of the
    newest sample sheet.
    """
    accelerator = make_accelerator(config)
    task = build_stage2_task(config, accelerator.device)
    return TrainingLoop(config, task, accelerator).run()
