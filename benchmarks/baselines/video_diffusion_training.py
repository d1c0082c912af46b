"""Train VDM or LVDM on the latents of a checkpoint's autoencoder, in the loop of our trainers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from video_diffusion import (
    VideoDiffusion,
    VideoDiffusionConfig,
    generate_latents,
    input_hash,
    save_network,
)

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.data import held_out_clips
from s2dm.models import load_checkpoint
from s2dm.pipelines.modules import build, build_tokenizer
from s2dm.sector import add_noise, training_target
from s2dm.training.cache import clip_latents, training_clips
from s2dm.training.config import TrainingConfig
from s2dm.training.loop import Progress, run_training, sheet_seed
from s2dm.training.models import frozen_vae
from s2dm.training.precision import precision_on
from s2dm.training.schedule import draw_timesteps
from s2dm.training.stage1 import embed_captions
from s2dm.video import write_contact_sheet


@dataclass(frozen=True, kw_only=True)
class VideoDiffusionTrainingConfig(TrainingConfig):
    """Settings of the trainer.

    `checkpoint` holds the VAE and the text encoder, which stay as they are, and the schedule,
    which is that of its stage 2. `text` is true for VDM, false for LVDM. `network` has the
    sizes; what it works on comes from the checkpoint.

    A batch is `clips` whole clips. `text_dropout` is the probability of the null label.
    """

    output: str = "runs/video_diffusion"
    checkpoint: str = str(DEFAULT_CHECKPOINT)
    text: bool = True
    network: VideoDiffusionConfig = field(default_factory=VideoDiffusionConfig)
    clips: int = 8
    text_dropout: float = 0.1
    validation_clips: int = 4
    sample_steps: int = 20
    guidance_scale: float = 2.0


class VideoDiffusionModel(nn.Module):
    """The network with the loss of diffusion, as the loop wants it."""

    def __init__(self, network: VideoDiffusion) -> None:
        super().__init__()
        self.network = network
        schedule = network.config.schedule
        self.prediction_type = schedule.prediction_type
        self.register_buffer("alpha_bars", schedule.alphas_cumprod(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of `VideoDiffusionTask.batch`; each frame has noise of its own."""
        clean, noise = batch["latents"], batch["noise"]
        alpha_bar = self.alpha_bars[batch["timesteps"]]
        prediction = self.network(
            add_noise(clean, noise, alpha_bar),
            batch["timesteps"],
            batch["text"],
            batch["keep_text"],
        )
        target = training_target(clean, noise, alpha_bar, self.prediction_type)
        return {"loss": F.mse_loss(prediction.float(), target)}


class VideoDiffusionTask:
    """What the loop needs to train VDM or LVDM.

    latents (C,N,c,h,w) of the clips, texts (C,text_dim) of their captions or None, clips to look
    at while training, and the hash that says what the network was trained on.
    """

    def __init__(
        self,
        config: VideoDiffusionTrainingConfig,
        model: VideoDiffusionModel,
        vae: nn.Module,
        latents: np.ndarray,
        texts: Tensor | None,
        held_out: list[dict[str, Any]],
        trained_on: str,
    ) -> None:
        self.config = config
        self.model = model
        self.vae = vae
        self.latents = latents
        self.texts = texts
        self.held_out = held_out
        self.trained_on = trained_on

    def compile(self) -> None:
        self.model.network.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        count = self.config.clips
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        timesteps = draw_timesteps(count, self.model.network.config.schedule.steps, generator)
        latents = torch.from_numpy(self.latents[chosen.numpy()].astype(np.float32))
        values = {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": timesteps,
            "text": None if self.texts is None else self.texts[chosen],
            "keep_text": torch.rand(count, generator=generator) >= self.config.text_dropout,
        }
        return {key: None if v is None else v.to(device) for key, v in values.items()}

    def sample(self, model: VideoDiffusionModel, path: Path) -> dict[str, float]:
        """For each held-out clip: its frames, above what is generated from its caption.

        The figure is the distance of neighbouring generated frames over that of true ones: above 1
        a clip flickers, near 0 it stands still.
        """
        config = self.config
        rows, changes = [], []
        for number, clip in enumerate(self.held_out):
            latents = generate_latents(
                model.network,
                clip["text"],
                (len(clip["frames"]), *self.latents.shape[2:]),
                config.sample_steps,
                config.guidance_scale,
                torch.Generator().manual_seed(sheet_seed(number)),
            )
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            generated = (decoded.cpu() / 2 + 0.5).clamp(0, 1)
            rows += [clip["frames"], generated]
            changes.append([frames.diff(dim=0).abs().mean() for frames in rows[-2:]])
        write_contact_sheet(path, rows)
        true, generated = torch.tensor(changes).sum(0)
        return {"change_ratio": float(generated / true)}

    def export(self, model: VideoDiffusionModel, path: Path) -> None:
        """Write the network alone: `evaluate.py` brings VAE and text encoder."""
        save_network(path, model.network, self.trained_on)


def build_task(config: VideoDiffusionTrainingConfig, device: torch.device) -> VideoDiffusionTask:
    """Prepare data, latents and model for `config`.

    Raises:
        ValueError: settings, data or checkpoint that don't fit together.
    """
    clips = training_clips(config)
    parts = ["vae", "text_encoder"] if config.text else ["vae"]
    checkpoint = load_checkpoint(config.checkpoint, parts)
    model_config = checkpoint.config
    vae = frozen_vae(*checkpoint["vae"], device)
    half = precision_on(device, config.mixed_precision) == "bf16"
    latents = clip_latents(clips, vae, model_config.vae.scaling_factor, device, half)
    held_out = [
        {"frames": clip.pixels, "caption": clip.caption, "text": None}
        for clip in held_out_clips(config.data, config.validation_clips)
    ]
    encoder = texts = None
    if config.text:
        encoder = build(checkpoint, "text_encoder")
        tokenizer = build_tokenizer(model_config)
        texts = embed_captions(encoder.to(device).eval(), tokenizer, clips.captions)
        for clip in held_out:
            clip["text"] = embed_captions(encoder, tokenizer, [clip["caption"]])
    sizes = dataclasses.replace(
        config.network,
        latent_channels=model_config.vae.latent_channels,
        text_dim=model_config.text_encoder.hidden_size if config.text else 0,
        schedule=model_config.schedule,
    )
    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    network = VideoDiffusion(sizes).to(memory_format=torch.channels_last)
    model = VideoDiffusionModel(network)
    trained_on = input_hash(vae, encoder)
    return VideoDiffusionTask(config, model, vae, latents, texts, held_out, trained_on)


def train(config: VideoDiffusionTrainingConfig) -> Progress:
    """Train as `config` says, or go on with the run in its folder.

    The folder's `export.safetensors` is the network with averaged weights, as of the newest
    sample sheet.
    """
    return run_training(config, lambda device: build_task(config, device))
