"""Train stage 1: the flow generator ε_φ, from prompt and reference frame (paper, section 3.4).

Starts from a checkpoint of stage 2, whose VAE makes the features of the reference frame and whose
text encoder reads the prompt, and writes that checkpoint with the flow generator in it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import held_out_clips
from ..flow import flow_to_image
from ..flow.geometry import resample
from ..models import FlowGenerator, decode_flow, encode_flow, mean_motion
from ..models.config import S2DMConfig
from ..pipelines.flow_generation import embed_prompts, flow_scheduler, generate_flow
from ..pipelines.modules import build, build_flow_generator, build_tokenizer
from ..sector import add_noise, training_target
from ..settings import SettingsError
from ..video import write_contact_sheet
from ..video.frames import spread
from .cache import ClipCache, clip_latents, training_clips
from .config import TrainingConfig
from .loop import Progress, run_training, sheet_seed
from .models import frozen_vae, load_model, preset, save_model
from .run_folder import measured_once
from .schedule import alpha_bars, draw_timesteps

_TEXTS = 64  # captions encoded at a time
_MOVING = 0.01  # half-frames: what moves further sets the scale of the displacement


@dataclass(frozen=True, kw_only=True)
class Stage1TrainingConfig(TrainingConfig):
    """Settings of the stage-1 trainer.

    `checkpoint` is a file with a VAE and a text encoder, which stay as they are; its flow
    generator is gone on from where it holds one, else the one of `preset` is new.

    A batch is `clips` whole clips. `reference_dropout`, `text_dropout` and `motion_dropout` are
    the probabilities of the null labels, each drawn for itself. Where the motion is not given
    the network moves as the data do, which is the default in use: hence half of the time.
    """

    output: str = "runs/stage1"
    preset: str = "puppets"
    checkpoint: str = ""
    clips: int = 8
    reference_dropout: float = 0.1
    text_dropout: float = 0.1
    motion_dropout: float = 0.5
    validation_clips: int = 4
    sample_frames: int = 8
    sample_steps: int = 20
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise SettingsError(
                "stage 1 needs a checkpoint with a VAE and a text encoder: set checkpoint to the "
                "export of the stage-2 trainer."
            )


class Stage1Model(nn.Module):
    """The flow generator with the loss of diffusion, as the loop wants it.

    The text encoder is frozen, and here to read the prompts of the sample sheets.
    """

    def __init__(self, flow_generator: FlowGenerator, text_encoder: nn.Module) -> None:
        super().__init__()
        self.flow_generator = flow_generator
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        schedule = flow_generator.config.schedule
        self.prediction_type = schedule.prediction_type
        self.register_buffer("alpha_bars", alpha_bars(schedule), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of `Stage1Task.batch`; each frame has noise of its own."""
        clean, noise = batch["flow"], batch["noise"]
        alpha_bar = self.alpha_bars[batch["timesteps"]]
        prediction = self.flow_generator(
            add_noise(clean, noise, alpha_bar),
            batch["timesteps"],
            batch["reference"],
            batch["text"],
            batch["motion"],
            keep_reference=batch["keep_reference"],
            keep_text=batch["keep_text"],
            keep_motion=batch["keep_motion"],
        )
        target = training_target(clean, noise, alpha_bar, self.prediction_type)
        return {"loss": F.mse_loss(prediction.float(), target)}


class Stage1Task:
    """What the loop needs to train stage 1."""

    def __init__(
        self,
        config: Stage1TrainingConfig,
        model_config: S2DMConfig,
        model: Stage1Model,
        tokenizer: Any,
        flows: np.ndarray,
        references: np.ndarray,
        texts: Tensor,
        validation: list[dict[str, Any]],
        others: dict[str, dict[str, Tensor]],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.model = model
        self.tokenizer = tokenizer
        self.flows = flows
        self.references = references
        self.texts = texts
        self.validation = validation
        self.others = others

    def compile(self) -> None:
        self.model.flow_generator.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        config, network = self.config, self.model.flow_generator.config
        count = config.clips
        chosen = torch.randint(len(self.flows), (count,), generator=generator)
        timesteps = draw_timesteps(count, network.schedule, generator)
        conditions = torch.from_numpy(self.flows[chosen.numpy()].astype(np.float32))
        flow = encode_flow(conditions, network)
        draw = torch.rand((3, count), generator=generator)
        values = {
            "flow": flow,
            "noise": torch.randn(flow.shape, generator=generator),
            "timesteps": timesteps,
            "reference": torch.from_numpy(self.references[chosen.numpy()].astype(np.float32)),
            "text": self.texts[chosen],
            "motion": mean_motion(conditions) if network.motion_strength else None,
            "keep_reference": draw[0] >= config.reference_dropout,
            "keep_text": draw[1] >= config.text_dropout,
            "keep_motion": draw[2] >= config.motion_dropout,
        }
        return {key: None if v is None else v.to(device) for key, v in values.items()}

    def sample(self, model: Stage1Model, path: Path) -> dict[str, float]:
        """For each held-out clip: reference frame, true flow, flow generated from both labels.

        The figure is the mean motion of the generated clips over that of the true ones.
        """
        config = self.config
        network = model.flow_generator
        device = next(network.parameters()).device
        captions = [clip["caption"] for clip in self.validation]
        text = embed_prompts(model.text_encoder, self.tokenizer, captions)
        references = torch.stack([clip["reference"] for clip in self.validation]).to(device)
        scheduler = flow_scheduler(network.config.schedule)
        samples = generate_flow(
            network,
            scheduler,
            text,
            references,
            config.sample_steps,
            config.guidance_scale,
            torch.Generator().manual_seed(sheet_seed(0)),
        ).cpu()
        rows, motion = [], []
        for clip, generated in zip(self.validation, samples, strict=True):
            true = clip["flow"]
            flow = decode_flow(generated, network.config, true.height, true.width)
            scale = max(true.magnitude().max().item(), 1.0)
            keep = spread(len(flow), config.sample_frames)
            rows.append(
                torch.cat(
                    [
                        clip["frame"][None],
                        flow_to_image(true.retime(len(flow)).select(keep), scale),
                        clip["frame"][None],
                        flow_to_image(flow.select(keep), scale),
                    ]
                )
            )
            motion.append((flow.magnitude().mean(), true.magnitude().mean()))
        write_contact_sheet(path, rows)
        generated, true = torch.tensor(motion).sum(0)
        return {"motion_ratio": float(generated / true)}

    def export(self, model: Stage1Model, path: Path) -> None:
        """Write the whole checkpoint: the flow generator, and the other parts as they were."""
        parts = {"flow_generator": model.flow_generator}
        save_model(path, self.model_config, parts, self.others)


def build_stage1_task(config: Stage1TrainingConfig, device: torch.device) -> Stage1Task:
    """Prepare data, latents and model for `config`."""
    clips = training_clips(config)
    start = load_model(config.checkpoint)
    model_config = start.config
    _check(config, model_config)
    vae = frozen_vae(*start["vae"], device)
    half = config.mixed_precision == "bf16"
    latents = clip_latents(clips, vae, model_config.vae.scaling_factor, device, half)
    model_config = _with_flow_generator(config, model_config, clips)
    network = model_config.flow_generator
    flows = _flows(clips, network.size)

    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    generator = build_flow_generator(network, start.states.get("flow_generator"))
    generator.to(memory_format=torch.channels_last)
    encoder = build(start, "text_encoder").to(device)
    model = Stage1Model(generator, encoder)
    tokenizer = build_tokenizer(model_config)
    others = {name: state for name, state in start.states.items() if name != "flow_generator"}
    return Stage1Task(
        config,
        model_config,
        model,
        tokenizer,
        flows,
        latents[:, 0],
        embed_captions(encoder, tokenizer, clips.captions),
        _validation(config, vae, model_config.vae.scaling_factor, device),
        others,
    )


def _check(config: Stage1TrainingConfig, model_config: S2DMConfig) -> None:
    lacking = [part for part in ("vae", "text_encoder") if getattr(model_config, part) is None]
    if lacking:
        raise SettingsError(
            f"stage 1 needs a checkpoint with a VAE and a text encoder, got {config.checkpoint} "
            f"without {' and '.join(lacking)}. Use the export of the stage-2 trainer."
        )
    if model_config.flow_generator is not None and model_config.flow_generator.flow == "positions":
        raise SettingsError(
            f"stage 1 trains on displacement from the VAE's latents, and {config.checkpoint} holds "
            "LFDM's flow generator, which has neither. Use a checkpoint without it."
        )


def _with_flow_generator(
    config: Stage1TrainingConfig, model_config: S2DMConfig, clips: ClipCache
) -> S2DMConfig:
    """The config with a flow generator; what depends on the data is measured on it."""
    if model_config.flow_generator is not None:
        return model_config
    network = preset(config.preset).flow_generator
    if network is None:
        raise SettingsError(f"the preset {config.preset!r} has no flow generator.")
    scale, motion = measured_once(config, "scales", lambda: _scales(clips))
    network = dataclasses.replace(
        network,
        reference_channels=model_config.vae.latent_channels,
        text_dim=model_config.text_encoder.hidden_size,
        frames=config.data.frames,
        displacement_scale=scale,
        motion=motion,
    )
    return dataclasses.replace(model_config, flow_generator=network)


def _scales(clips: ClipCache) -> tuple[float, float]:
    """Root mean square displacement of what moves, and mean motion of a clip, in half-frames.

    With the first as the unit the samples have about the variance that noise has.
    """
    squares, count, motion = 0.0, 0, 0.0
    for clip in range(len(clips)):
        condition = torch.from_numpy(clips.conditions[clip].astype(np.float32))
        length = condition[:, :2].norm(dim=1)
        moving = length[length > _MOVING]
        squares += float(moving.square().sum())
        count += len(moving)
        motion += float(mean_motion(condition))
    if not count:
        raise SettingsError("stage 1 learns motion, and in these clips nothing moves.")
    return (squares / count) ** 0.5, motion / len(clips)


def _flows(clips: ClipCache, size: tuple[int, int]) -> np.ndarray:
    """The flow conditions of all clips at the network's size, (C,N,3,h,w) float16."""
    count, frames = clips.conditions.shape[:2]
    flows = np.empty((count, frames, 3, *size), np.float16)
    for clip in range(count):
        condition = torch.from_numpy(clips.conditions[clip].astype(np.float32))
        flows[clip] = resample(condition, *size).half().numpy()
    return flows


@torch.no_grad()
def embed_captions(encoder: nn.Module, tokenizer: Any, captions: list[str]) -> Tensor:
    """What the network is given of each caption, (C, text_dim): always the same, so made once."""
    parts = (captions[start : start + _TEXTS] for start in range(0, len(captions), _TEXTS))
    return torch.cat([embed_prompts(encoder, tokenizer, part).cpu() for part in parts])


@torch.no_grad()
def _validation(
    config: Stage1TrainingConfig, vae: nn.Module, scale: float, device: torch.device
) -> list[dict[str, Any]]:
    clips = []
    for clip in held_out_clips(config.data, config.validation_clips):
        frame = clip.pixels[0]
        latents = vae.encode(frame[None].to(device) * 2 - 1).latent_dist.mode() * scale
        clips.append(
            {"frame": frame, "reference": latents[0], "flow": clip.flow, "caption": clip.caption}
        )
    return clips


def train_stage1(config: Stage1TrainingConfig) -> Progress:
    """Train stage 1 as `config` says, or go on with the run in its folder.

    The folder's `export.safetensors` is the whole checkpoint with averaged weights, as of the
    newest sample sheet.
    """
    return run_training(config, lambda device: build_stage1_task(config, device))
