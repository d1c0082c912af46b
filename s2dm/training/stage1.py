"""Train stage 1: the flow generator ε_φ, from prompt and reference frame (paper, section 3.4).

Starts from a checkpoint of stage 2, whose VAE makes the features of the reference frame and whose
text encoder reads the prompt, and writes that checkpoint with the flow generator in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import held_out_clips
from ..data.prepared import PreparedClips
from ..flow import flow_to_image
from ..flow.geometry import resample
from ..models import SD15, FlowGenerator, FlowGeneratorConfig, S2DMConfig, decode_flow
from ..pipelines.flow_generation import embed_prompts, flow_scheduler, generate_flow
from ..pipelines.modules import build, build_flow_generator, build_tokenizer, decode
from ..settings import SettingsError
from ..video import write_contact_sheet
from ..video.frames import spread
from .cache import ClipCache, clip_latents, training_clips
from .config import TrainingConfig
from .flow_generator import (
    Batch,
    Dropouts,
    FlowClips,
    fitted,
    flow_loss,
    measure,
    preset_size,
    read_flow_clips,
)
from .loop import Progress, run_training, sheet_seed
from .models import frozen_vae, load_model, save_model
from .precision import precision_on
from .run_folder import measured_once

_TEXTS = 64  # captions encoded at a time


@dataclass(frozen=True, kw_only=True)
class Stage1TrainingConfig(Dropouts, TrainingConfig):
    """Settings of the stage-1 trainer.

    `checkpoint` is a file with a VAE and a text encoder, which stay as they are; its flow
    generator is gone on from where it holds one, else it is new, in the size of `preset`: "lfdm"
    or "puppets"; empty for LFDM's where the text encoder is Stable Diffusion's, else the small one.
    It learns from `data`, or from the prepared clips in `clips_folder`.
    """

    output: str = "runs/stage1"
    preset: str = ""
    checkpoint: str = ""
    clips_folder: str = ""
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
        table = flow_generator.config.schedule.alphas_cumprod()
        self.register_buffer("alpha_bars", table, persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `FlowClips`."""
        return {"loss": flow_loss(self.flow_generator, batch, self.alpha_bars)}


@dataclass(eq=False)
class Stage1Task:
    """What the loop needs to train stage 1."""

    config: Stage1TrainingConfig
    model_config: S2DMConfig
    model: Stage1Model
    tokenizer: Any
    data: FlowClips
    validation: list[dict[str, Any]]
    others: dict[str, dict[str, Tensor]]

    def compile(self) -> None:
        self.model.flow_generator.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> Batch:
        batch = self.data.batch(self.model.flow_generator.config, self.config, generator)
        return {key: None if v is None else v.to(device) for key, v in batch.items()}

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
    start = load_model(config.checkpoint)
    model_config = start.config
    _check(config, model_config)
    vae = frozen_vae(*start["vae"], device)
    encoder, tokenizer = build(start, "text_encoder").to(device), build_tokenizer(model_config)
    made = _prepared if config.clips_folder else _cached
    network = model_config.flow_generator or new_size(config.preset, model_config)
    data, conditions, validation = made(config, model_config, network.size, vae, encoder, tokenizer)
    if model_config.flow_generator is None:
        network = _fitted(config, network, data, conditions)
        model_config = dataclasses.replace(model_config, flow_generator=network)

    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    flow_generator = build_flow_generator(network, start.states.get("flow_generator"))
    flow_generator.to(memory_format=torch.channels_last)
    model = Stage1Model(flow_generator, encoder)
    others = {name: state for name, state in start.states.items() if name != "flow_generator"}
    return Stage1Task(config, model_config, model, tokenizer, data, validation, others)


def new_size(preset: str, model_config: S2DMConfig) -> FlowGeneratorConfig:
    """The size of a new flow generator beside a model, as the setting `preset` says it.

    Raises:
        SettingsError: no such preset.
    """
    # Without a name, a small network beside Stable Diffusion would be taken in silence.
    large = model_config.text_encoder == SD15.text_encoder
    return preset_size(preset or ("lfdm" if large else "puppets"))


def _cached(
    config: Stage1TrainingConfig,
    model_config: S2DMConfig,
    size: tuple[int, int],
    vae: nn.Module,
    encoder: nn.Module,
    tokenizer: Any,
) -> tuple[FlowClips, Iterable[Tensor], list[dict[str, Any]]]:
    """The clips of `data`, their conditions to measure the scale on, and held-out ones."""
    clips = training_clips(config)
    scale = model_config.vae.scaling_factor
    half = precision_on(vae.device, config.mixed_precision) == "bf16"
    latents = clip_latents(clips, vae, scale, vae.device, half)
    data = FlowClips(
        torch.from_numpy(_flows(clips, size)),
        torch.from_numpy(np.array(latents[:, 0])),
        embed_captions(encoder, tokenizer, clips.captions),
        clips.choices,
    )
    conditions = (
        torch.from_numpy(clips.conditions[clip, draw])
        for clip in range(len(clips))
        for draw in clips.parts
    )
    return data, conditions, _validation(config, vae, scale, vae.device)


def _prepared(
    config: Stage1TrainingConfig,
    model_config: S2DMConfig,
    size: tuple[int, int],
    vae: nn.Module,
    encoder: nn.Module,
    tokenizer: Any,
) -> tuple[FlowClips, Iterable[Tensor], list[dict[str, Any]]]:
    """The same of prepared clips, of which the first ones are shown: none are held out."""
    clips = PreparedClips(config.clips_folder)
    expected = model_config.vae.latent_channels
    if clips.latent_shape[0] != expected:
        raise SettingsError(
            f"clips_folder: expected latents of {expected} channels, as the checkpoint has them, "
            f"got {clips.latent_shape[0]}. Prepare the clips with this checkpoint's VAE."
        )
    scale = model_config.vae.scaling_factor
    texts = embed_captions(encoder, tokenizer, clips.captions)
    data = read_flow_clips(clips, size, scale, texts)
    shown = [
        {
            "frame": decode(vae, clips.latents(clip, [0]).to(vae.device))[0],
            "reference": data.references[clip],
            "flow": clips.flow(clip),
            "caption": clips.captions[clip],
        }
        for clip in range(min(config.validation_clips, len(clips)))
    ]
    return data, data.conditions, shown


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


def _fitted(
    config: Stage1TrainingConfig,
    network: FlowGeneratorConfig,
    data: FlowClips,
    conditions: Iterable[Tensor],
) -> FlowGeneratorConfig:
    """A new network's config; what depends on the data is measured on it, once in a run."""
    scales = measured_once(config, "scales", lambda: measure(conditions))
    return fitted(network, data, *scales)


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
