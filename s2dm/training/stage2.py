"""Train stage 2: the denoiser ε_θ with its flow adapter, by the shared-noise loss (Eq. 11).

From random weights (the small bundled model, text encoder included) or from a checkpoint such as
Stable Diffusion 1.5, whose text encoder then stays frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import held_out_clips
from ..flow import FlowField, flow_to_image
from ..models import LATENT_CELL, FlowAdapterConfig, S2DMConfig
from ..models.checkpoint import Checkpoint
from ..models.tokenizer import train_tokenizer, with_tokenizer
from ..pipelines import FlowAdapterModel, FlowToVideoPipeline
from ..pipelines.attention import attach_adapter
from ..pipelines.modules import (
    build_flow_adapter,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    ddim_scheduler,
    tokenize,
)
from ..sector import ReferenceStates, sector_loss
from ..settings import SettingsError
from ..video import write_contact_sheet
from ..video.frames import spread
from .cache import ClipCache, clip_latents, training_clips
from .config import TrainingConfig
from .loop import Progress, run_training, sheet_seed
from .models import (
    frozen_vae,
    load_model,
    preset,
    save_model,
)
from .precision import precision_on
from .run_folder import measured_once
from .schedule import LabelsAndNoise, draw_timesteps

_LEARNING = ("unet", "flow_adapter", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class Stage2TrainingConfig(LabelsAndNoise, TrainingConfig):
    """Settings of the stage-2 trainer.

    Start: `checkpoint` (a file with a U-Net and a text encoder; parts it lacks are new) or else
    random weights in the sizes of `preset`. `vae` and `text_encoder` are files to take the
    VAE, and the text encoder with its tokenizer, from if they are not the checkpoint's. `train`
    names the parts that learn. `fusion` is that of a new adapter, which takes the place of one that
    was never trained. With stage 1 in the checkpoint its text encoder has to stay.

    A batch is `clips` clips with `clip_frames` frames each, drawn from the clip; with
    probability `first_frame` one of them is frame 1, which the flow starts from. With
    `reference_attention` it always is, and the self-attention of the others sees it too, but in a
    share `reference_dropout` of the batches; that is what sampling with reference attention is
    trained by.

    Where somebody stands who is `elsewhere` than captions mean, frame 1 can't know, nor can a frame
    without flow, before the noise lets it be seen. In the first `place_start` of the noise schedule
    these frames don't count, so that a caption alone still means the usual place.

    `adapter_gain` is the initial size of the adapter's projections: 0 keeps a pretrained U-Net as
    it is at the start, 1 lets a new one learn sooner.

    `sampling` is what the checkpoint is to recommend, entries of `SamplingConfig` in place of
    the start's; `sample_steps` and `guidance_scale` are those of the sample sheets.
    """

    output: str = "runs/stage2"
    preset: str = "puppets"
    checkpoint: str = ""
    vae: str = ""
    text_encoder: str = ""
    fusion: str = "channel"
    train: tuple[str, ...] = _LEARNING
    adapter_gain: float = 0.0
    clips: int = 16
    clip_frames: int = 4
    first_frame: float = 0.25
    reference_attention: bool = False
    reference_dropout: float = 0.1
    place_start: float = 0.15
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
        unknown = sorted(set(self.train) - set(_LEARNING))
        if unknown or not self.train:
            raise SettingsError(
                f"train must name some of {', '.join(_LEARNING)}, got {list(self.train)}."
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
        self.prediction_type = config.schedule.prediction_type
        self.register_buffer("alpha_bars", config.schedule.alphas_cumprod(), persistent=False)
        attach_adapter(unet, flow_adapter)

    def flow_tokens(
        self, conditions: Tensor, null: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Conditions (M,3,h,w) to tokens (M,T,d); the learned null label where `null` (M,).

        size: height and width of the latents.
        """
        tokens = self.flow_adapter.encode(conditions)
        nothing = self.flow_adapter.null_tokens(len(tokens), size).to(tokens.dtype)
        return torch.where(null[:, None, None], nothing, tokens)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of `Stage2Task.batch`; a clip's frames share text, t and null labels."""
        latents, conditions = batch["latents"], batch["conditions"]
        frames = latents.shape[1]
        text = self.text_encoder(batch["token_ids"]).last_hidden_state.repeat_interleave(frames, 0)
        null = batch["flow_null"].repeat_interleave(frames)
        size = tuple(latents.shape[-2:])
        tokens = self.flow_tokens(conditions.flatten(0, 1), null, size)
        conditioned: dict[str, Any] = {"flow_tokens": tokens, "flow_size": size}
        if "reference" in batch:
            # A fresh one: what is computed again for checkpointing keeps the same states again.
            beside = ReferenceStates().beside
            conditioned["reference"] = functools.partial(beside, groups=len(latents), first=True)

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            return self.unet(x_t, timesteps, text, cross_attention_kwargs=conditioned).sample

        loss = sector_loss(
            predict,
            latents,
            batch["noise"],
            batch["timesteps"],
            self.alpha_bars,
            self.prediction_type,
            batch["weights"],
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
        self.token_ids = tokenize(tokenizer, [*clips.captions, ""])
        # It shares the model's modules, so a sheet is made with what they hold at that time.
        self.pipeline = FlowToVideoPipeline(
            vae=vae,
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            unet=model.unet,
            scheduler=ddim_scheduler(model_config.schedule),
            flow_adapter=FlowAdapterModel.wrap(model.flow_adapter),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.validation = self._validation()

    def compile(self) -> None:
        self.model.unet.compile(dynamic=False)
        adapter = self.model.flow_adapter
        for encoder in (adapter.encoder, adapter.pyramid):
            if encoder is not None:
                encoder.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        config = self.config
        chosen = torch.randint(len(self.clips), (config.clips,), generator=generator)
        text_null, flow_null = config.draw_nulls(config.clips, generator)
        timesteps = draw_timesteps(config.clips, self.model_config.schedule.steps, generator)
        # All before any noise: runs that differ in their noise sharing see the same frames.
        frames_of = [self._frames(generator) for _ in chosen]
        latents, conditions, noise = [], [], []
        for clip, frames in zip(chosen.tolist(), frames_of, strict=True):
            latents.append(torch.from_numpy(self.latents[clip, frames]))
            conditions.append(torch.from_numpy(self.clips.conditions[clip, frames]))
            noise.append(config.sharing.draw(len(frames), self.latents.shape[2:], generator))
        # Drawn last, so that all else is as without it.
        reference = config.reference_attention and (
            torch.rand((), generator=generator) >= config.reference_dropout
        )
        elsewhere = torch.from_numpy(self.clips.elsewhere[chosen.numpy()])
        early = timesteps >= (1 - config.place_start) * self.model_config.schedule.steps
        placeless = flow_null[:, None] | (torch.tensor(frames_of) == 0)
        empty = len(self.token_ids) - 1
        values = {
            "latents": torch.stack(latents),
            "conditions": torch.stack(conditions),
            "noise": torch.stack(noise),
            "token_ids": self.token_ids[torch.where(text_null, empty, chosen)],
            "flow_null": flow_null,
            "timesteps": timesteps,
            "weights": (~(placeless & (elsewhere & early)[:, None])).float(),
        }
        if reference:  # told by its presence: a value on a GPU would have to be waited for
            values["reference"] = torch.ones(())
        values = {key: value.to(device) for key, value in values.items()}
        # Half as large until they are there.
        return values | {key: values[key].float() for key in ("latents", "conditions")}

    def _frames(self, generator: torch.Generator) -> list[int]:
        """Distinct frame numbers of a clip; the first may be frame 1 of the paper, index 0."""
        drawn = self.clips.draw(generator)
        count = len(drawn)
        size = min(self.config.clip_frames, count)
        others = (1 + torch.randperm(count - 1, generator=generator)).tolist()
        always = size == count or self.config.reference_attention
        if always or torch.rand((), generator=generator) < self.config.first_frame:
            others.insert(0, 0)
        return [drawn[number] for number in others[:size]]

    def _validation(self) -> list[Any]:
        clips = []
        for clip in held_out_clips(self.config.data, self.config.validation_clips):
            keep = sorted(set(spread(len(clip.frames), self.config.sample_frames)))
            clips.append(
                {
                    "frames": clip.pixels[keep],
                    "flow": clip.flow.select(keep),
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
            generated = self.pipeline(
                clip["caption"],
                flow,
                sampling={
                    "steps": self.config.sample_steps,
                    "guidance_scale": self.config.guidance_scale,
                },
                seed=sheet_seed(number),
                noise_sharing=self.config.sharing,
            ).frames
            rows += [clip["frames"], flow_to_image(flow), generated]
            errors.append((generated - clip["frames"]).abs().mean())
        write_contact_sheet(path, rows)
        return {"sample_error": float(torch.stack(errors).mean())}

    def export(self, model: Stage2Model, path: Path) -> None:
        """Write the whole checkpoint, with the flow generator as the start had it, if any."""
        parts = {
            "unet": model.unet,
            "text_encoder": model.text_encoder,
            "vae": self.vae,
            "flow_adapter": model.flow_adapter,
        }
        save_model(path, self.model_config, parts, self.others)


def build_stage2_task(
    config: Stage2TrainingConfig, device: torch.device, clips: ClipCache | None = None
) -> Stage2Task:
    """Prepare data, latents and model for `config`.

    clips: in place of those that the settings name; their conditions are of a size that the flow
        adapter can encode.
    """
    start = load_model(config.checkpoint) if config.checkpoint else None
    kept = _kept_adapter(config, start)
    if clips is None:
        side = config.data.size // LATENT_CELL
        size = (kept or FlowAdapterConfig(fusion=config.fusion)).condition_size(side, side)
        clips = training_clips(config, condition_size=size)
    model_config, states = _start(config, start, kept, clips.captions)
    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    unet = build_unet(model_config.unet, states.get("unet"))
    adapter = build_flow_adapter(model_config.flow_adapter, states.get("flow_adapter"))
    text_encoder = build_text_encoder(model_config.text_encoder, states.get("text_encoder"))
    vae = frozen_vae(model_config.vae, states["vae"], device)
    if "flow_adapter" not in states and config.adapter_gain > 0:
        for layer in adapter.layers.values():
            for projection in layer.values():
                nn.init.xavier_uniform_(projection.weight, config.adapter_gain)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    model = Stage2Model(unet, adapter, text_encoder, model_config)
    for part in _LEARNING:
        getattr(model, part).requires_grad_(part in config.train)
    model.unet.to(memory_format=torch.channels_last)

    half = precision_on(device, config.mixed_precision) == "bf16"
    latents = clip_latents(clips, vae, model_config.vae.scaling_factor, device, half)
    tokenizer = build_tokenizer(model_config)
    others = {name: state for name, state in states.items() if name == "flow_generator"}
    return Stage2Task(config, model_config, model, vae, tokenizer, clips, latents, others)


def _kept_adapter(
    config: Stage2TrainingConfig, start: Checkpoint | None
) -> FlowAdapterConfig | None:
    """The adapter of the checkpoint, if it is trained on; None where a new one takes its place."""
    if start is None or "flow_adapter" not in start:
        return None
    adapter, state = start["flow_adapter"]
    if adapter.fusion == config.fusion:
        return adapter
    if not any(weight.any() for name, weight in state.items() if ".to_" in name):
        return None  # `s2dm convert` adds one that was never trained
    if config.fusion != Stage2TrainingConfig.fusion:
        raise SettingsError(
            f"{config.checkpoint} holds an adapter that was trained with {adapter.fusion} fusion, "
            f"got fusion={config.fusion!r}. Leave fusion out to train it on, or start from a "
            "checkpoint without an adapter."
        )
    return adapter


def _start(
    config: Stage2TrainingConfig,
    start: Checkpoint | None,
    kept: FlowAdapterConfig | None,
    captions: list[str],
) -> tuple[S2DMConfig, dict[str, dict[str, Tensor]]]:
    """The model's config and the weights that exist already, by part."""
    if start is not None:
        model_config, states = start.config, dict(start.states)
        if "unet" not in start:
            raise SettingsError(
                f"stage 2 needs a checkpoint with a U-Net, got {config.checkpoint} without. Leave "
                "checkpoint empty to start from random weights; a VAE or a text encoder alone is "
                "given as vae or text_encoder."
            )
        if "flow_generator" in states:
            _leave_stage_1_its_text(config)
    else:
        model_config, states = preset(config.preset), {}
        model_config = dataclasses.replace(model_config, flow_generator=None)
        if model_config.tokenizer is None and not config.text_encoder:
            vocabulary = model_config.text_encoder.vocab_size
            spec = measured_once(config, "tokenizer", lambda: train_tokenizer(captions, vocabulary))
            model_config = with_tokenizer(model_config, spec)
    if config.text_encoder:
        read = load_model(config.text_encoder, ["text_encoder"])
        size, states["text_encoder"] = read["text_encoder"]
        model_config = dataclasses.replace(
            model_config, text_encoder=size, tokenizer=read.config.tokenizer
        )
    if config.vae:
        vae_config, states["vae"] = load_model(config.vae, ["vae"])["vae"]
        model_config = dataclasses.replace(model_config, vae=vae_config)
    if "vae" not in states:
        raise SettingsError(
            "stage 2 needs a trained VAE: set vae to a file that holds one, for example the "
            "export of the VAE trainer."
        )
    if kept is None:
        states.pop("flow_adapter", None)
        adapter = FlowAdapterConfig.for_unet(model_config.unet, fusion=config.fusion)
        model_config = dataclasses.replace(model_config, flow_adapter=adapter)
    model_config = model_config.recommending(config.sampling)
    model_config = dataclasses.replace(
        model_config,
        resolution=(config.data.size, config.data.size),
        # Stage 1 says how long a clip is; stage 2 may learn from a few frames of it.
        frames=model_config.frames if "flow_generator" in states else config.data.frames,
        noise_sharing=config.noise_sharing,
        noise_share=config.noise_share if config.noise_sharing == "mixed" else 1.0,
        data=config.description or model_config.data,
        licence=config.licence or model_config.licence,
    )
    return model_config, states


def _leave_stage_1_its_text(config: Stage2TrainingConfig) -> None:
    """Stage 1 reads the prompt with the same text encoder, and isn't here to follow a change."""
    if "text_encoder" not in config.train and not config.text_encoder:
        return
    raise SettingsError(
        f"{config.checkpoint} holds stage 1, which reads the prompt with the same text encoder: "
        f"expected one that stays as it is, got train={list(config.train)} and "
        f"text_encoder={config.text_encoder!r}. Leave it out of both, "
        'train=["unet", "flow_adapter"]. To change it, run the text trainer on the checkpoint '
        "first, and stage 1 again at the end."
    )


def train_stage2(config: Stage2TrainingConfig) -> Progress:
    """Train stage 2 as `config` says, or go on with the run in its folder.

    The folder's `export.safetensors` is the whole checkpoint with averaged weights, as of the
    newest sample sheet.
    """
    return run_training(config, lambda device: build_stage2_task(config, device))
