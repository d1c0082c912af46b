"""Train a flow adapter alone, on a denoiser that stays as it is (paper, Eq. 11).

The trainer takes the denoiser as a function and knows nothing of whose it is: ComfyUI's nodes bind
core's model, `adapter_run` that of diffusers. Frames of a clip don't see one another, so the
gradient of a step is summed over chunks of frames, exactly: memory does not grow with the clip.

What a run is beside this, and how it goes on, is `trainer`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.prepared import PreparedClips
from ..models import (
    AdapterTrainingConfig,
    FlowAdapter,
    FlowAdapterConfig,
    ScheduleConfig,
    save_adapter,
)
from ..sector import NoiseSharing, add_noise, predicted_x0, training_target
from ..sector.diffusion import PREDICTION_TYPES
from ..settings import SettingsError
from .loop import step_generator
from .lora import LoRA, save_lora
from .schedule import LabelsAndNoise, draw_timesteps
from .trainer import Trainer, TrainerSettings, TrainingError


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(LabelsAndNoise, TrainerSettings):
    """How an adapter is trained.

    A step takes `clips` clips, and `frames` frames of each (0: all of them); the U-Net sees
    `chunk` of these at a time. With a `lora_rank` above 0 a LoRA of that rank on the U-Net's
    attention learns beside the adapter.
    """

    frames: int = 4
    lora_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 0:
            raise SettingsError(f"frames must be 0 (all) or more, got {self.frames}.")
        if self.lora_rank < 0:
            raise SettingsError(f"lora_rank must be 0 (none) or more, got {self.lora_rank}.")


@dataclass(frozen=True)
class Denoiser:
    """A denoiser that doesn't learn, with its conditions open.

    predict: (x_t (B,C,h,w), t (B,) whole numbers, flow tokens (B,T,width), text (B,L,width)), all
        on `device` → what the network predicts, (B,C,h,w). It carries the gradient to the tokens,
        and to the adapter that it holds.
    alpha_bars: ᾱ_t of every timestep, (T,).
    prediction_type: see `training_target`.
    device: of all that goes in.
    scale: latents of the VAE → latents as the network sees them.
    lora: on the network, to learn beside the adapter; in float32 and on `device`.
    """

    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    alpha_bars: Tensor
    prediction_type: str
    device: torch.device
    scale: Callable[[Tensor], Tensor] = lambda latents: latents
    lora: LoRA | None = None


def new_adapter(config: FlowAdapterConfig, seed: int) -> FlowAdapter:
    """An untrained adapter, the same for a seed wherever it is made; no generator is disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlowAdapter(config, device="cpu", dtype=torch.float32)


@dataclass(frozen=True)
class Batch:
    """What a step is made of: rows are frames, those of a clip next to one another.

    latents, noise: (B,C,h,w). timesteps: (B,). conditions: (B,3,*size).
    text: (clips, L, width), and `clip_of` (B,) says which is a row's. flow_null: (B,) bool.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: Tensor
    text: Tensor
    clip_of: Tensor
    flow_null: Tensor


class AdapterTrainer(Trainer):
    """A run that trains an adapter on a denoiser that holds it.

    Args:
        settings: of the run.
        adapter: to train, in float32 and on the denoiser's device; the one that it holds.
        denoiser: that the adapter is for.
        clips: to learn from, made with the denoiser's VAE and text encoder.
        folder, shared: see `Trainer`.

    Raises:
        TrainingError: a kind of prediction that isn't known, or a run in the folder that can't be
            gone on with.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        adapter: FlowAdapter,
        denoiser: Denoiser,
        clips: PreparedClips,
        folder: str | Path,
        resume: bool = True,
        **shared: Any,
    ) -> None:
        if denoiser.prediction_type not in PREDICTION_TYPES:
            raise TrainingError(
                f"expected a model that predicts {' or '.join(PREDICTION_TYPES)}, got "
                f"{denoiser.prediction_type!r}. Train on a Stable Diffusion 1.x model."
            )
        self.settings = settings
        self.adapter = adapter
        self.denoiser = denoiser
        networks: dict[str, nn.Module] = {"adapter": adapter}
        if denoiser.lora is not None:
            networks["lora"] = denoiser.lora
        super().__init__(settings, networks, clips, denoiser.device, folder, resume, **shared)

    def identity(self) -> dict[str, Any]:
        """See `Trainer`."""
        return {"adapter": self.adapter.config.to_dict(), "clips": self.clips.key}

    def batch(self, step: int) -> Batch:
        """What a step is made of; seed and step alone decide."""
        settings = self.settings
        generator = step_generator(settings.seed, step, self.process)
        count = settings.clips
        chosen = torch.randint(len(self.clips), (count,), generator=generator).tolist()
        text_null, flow_null = settings.draw_nulls(count, generator)
        timesteps = draw_timesteps(count, len(self.denoiser.alpha_bars), generator)
        latents, conditions, noise, texts = [], [], [], []
        size = self._condition_size()
        for number, clip in enumerate(chosen):
            frames = self._frames(generator)
            latents.append(self.denoiser.scale(self.clips.latents(clip, frames)))
            conditions.append(self.clips.condition(clip, frames, size))
            noise.append(settings.sharing.draw(len(frames), self.clips.latent_shape, generator))
            texts.append(self.clips.empty_text if text_null[number] else self.clips.text(clip))
        rows = len(latents[0])
        parts = (
            torch.cat(latents),
            torch.cat(noise),
            timesteps.repeat_interleave(rows),
            torch.cat(conditions),
            torch.stack(texts),
            torch.arange(count).repeat_interleave(rows),
            flow_null.repeat_interleave(rows),
        )
        return Batch(*(part.to(self.denoiser.device) for part in parts))

    def _frames(self, generator: torch.Generator) -> list[int]:
        """Distinct frames of a clip, in order."""
        count = self.clips.num_frames
        size = min(self.settings.frames or count, count)
        return sorted(torch.randperm(count, generator=generator)[:size].tolist())

    def _condition_size(self) -> tuple[int, int]:
        _, height, width = self.clips.latent_shape
        return self.adapter.condition_size(height, width)

    def size(self, batch: Batch) -> int:
        """Frames, of all clips together."""
        return len(batch.latents)

    def loss(self, batch: Batch, rows: slice) -> Tensor:
        """Eq. 11, the mean over these frames and their elements."""
        latents, noise = batch.latents[rows], batch.noise[rows]
        timesteps = batch.timesteps[rows]
        alpha_bar = self.denoiser.alpha_bars.to(latents.device)[timesteps]
        x_t = add_noise(latents, noise, alpha_bar)
        target = training_target(latents, noise, alpha_bar, self.denoiser.prediction_type)
        tokens = self.tokens(batch.conditions[rows], batch.flow_null[rows])
        text = batch.text[batch.clip_of[rows]]
        prediction = self.denoiser.predict(x_t, timesteps, tokens, text)
        return torch.nn.functional.mse_loss(prediction.float(), target.float())

    def tokens(self, conditions: Tensor, null: Tensor) -> Tensor:
        """Conditions (B,3,h,w) to flow tokens; the learned null label where `null` (B,)."""
        tokens = self.adapter.encode(conditions)
        size = (self.clips.latent_shape[1], self.clips.latent_shape[2])
        nothing = self.adapter.null_tokens(len(tokens), size).to(tokens)
        return torch.where(null[:, None, None], nothing, tokens)

    def export(self, path: Path, base: str = "", lora: Path | None = None) -> None:
        """Write the averaged adapter alone, in half precision, with what it was trained on.

        Args:
            path: of the file.
            base: name of the model that it was trained for.
            lora: of the LoRA's file, where one learned too.

        Raises:
            TrainingError: the disk is full, or the file can't be written.
        """
        if self.process != 0:
            return
        clips, (height, width) = self.clips, self.clips.flow_size
        kind = self.denoiser.prediction_type
        data = f"{clips.folder.name} ({clips.key})"
        if self.denoiser.lora is not None and lora is not None:
            told = f"{data}: {len(clips)} clips, {self.step} steps, for {base or 'a model'}"
            save_lora(lora, self.denoiser.lora, self.averaged_state("lora"), told)
            data += f", with the LoRA {lora.name}"
        with self.writing(path):
            save_adapter(
                path,
                self.adapter.config,
                self.averaged_state("adapter"),
                training=AdapterTrainingConfig(base=base, clips=len(clips), steps=self.step),
                schedule=ScheduleConfig(steps=len(self.denoiser.alpha_bars), prediction_type=kind),
                resolution=(height, width),
                frames=clips.num_frames,
                data=data,
                dtype=torch.float16,
            )

    @torch.no_grad()
    def sample(
        self,
        clip: int = 0,
        num_frames: int = 4,
        steps: int = 10,
        guidance_scale: float = 3.0,
        seed: int = 1,
    ) -> Tensor:
        """Latents of frames spread over a clip, generated from its caption and flow by DDIM.

        Text and flow are guided together, from their null labels. Averaged weights, shared noise.

        Returns:
            (num_frames, C, h, w) latents as the network sees them.
        """
        count = min(num_frames, self.clips.num_frames)
        last = self.clips.num_frames - 1
        chosen = [round(i * last / max(1, count - 1)) for i in range(count)]
        device = self.denoiser.device
        conditions = self.clips.condition(clip, chosen, self._condition_size()).to(device)
        generator = torch.Generator().manual_seed(seed)
        x = NoiseSharing().draw(count, self.clips.latent_shape, generator).to(device).contiguous()
        texts = torch.stack([self.clips.text(clip), self.clips.empty_text]).to(device)
        alpha_bars = self.denoiser.alpha_bars.to(device)
        kind = self.denoiser.prediction_type
        times = torch.linspace(len(alpha_bars) - 1, 0, steps + 1).round().long().tolist()
        with self.averaged():
            tokens = [self.tokens(conditions, torch.full((count,), null, device=device))
                      for null in (False, True)]  # fmt: skip
            for now, after in itertools.pairwise(times):
                guided = []
                for told, text in zip(tokens, texts, strict=True):
                    parts = []
                    for rows in torch.arange(count, device=device).split(self.settings.chunk):
                        self.between()
                        t = torch.full((len(rows),), now, device=device)
                        beside = text.expand(len(rows), -1, -1)
                        out = self.denoiser.predict(x[rows], t, told[rows], beside)
                        parts.append(out.float())
                    guided.append(torch.cat(parts))
                prediction = torch.lerp(guided[1], guided[0], guidance_scale)
                alpha_bar = alpha_bars[now].expand(count)
                x0 = predicted_x0(prediction, x, alpha_bar, kind)
                signal, spread = alpha_bars[now].sqrt(), (1 - alpha_bars[now]).sqrt()
                noise = (x - signal * x0) / spread
                x = alpha_bars[after].sqrt() * x0 + (1 - alpha_bars[after]).sqrt() * noise
        return x0
