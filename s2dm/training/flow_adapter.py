"""Train a flow adapter alone, on a denoiser that stays as it is (paper, Eq. 11).

The trainer takes the denoiser as a function and knows nothing of whose it is: ComfyUI's nodes bind
core's model, `adapter_run` that of diffusers. Frames of a clip don't see one another, so the
gradient of a step is summed over chunks of frames, exactly: memory does not grow with the clip.

Seed and step alone decide what a step draws, and the state on disk holds all else, so a run that
was stopped goes on with the losses of one that never was.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.prepared import PreparedClips
from ..files import save_tensors, write_json
from ..models import (
    AdapterTrainingConfig,
    FlowAdapter,
    FlowAdapterConfig,
    ScheduleConfig,
    save_adapter,
)
from ..sector import NoiseSharing, add_noise, predicted_x0, training_target
from ..sector.diffusion import PREDICTION_TYPES
from ..settings import SettingsError, to_dict
from .loop import EMA, RunFolder, step_generator

_MAY_CHANGE = {"steps", "chunk", "save_every"}
"""Settings that a run may go on with others of: they change nothing that was done."""


class AdapterTrainingError(ValueError):
    """Training that can't start or go on; the message says why, and what to change."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How an adapter is trained.

    A step takes `clips` clips, and `frames` frames of each (0: all of them); the U-Net sees
    `chunk` of these at a time, which changes memory alone. Labels are replaced by null labels with
    fixed probabilities, from which guidance starts: `label_dropout` for text and flow together,
    `text_dropout` and `flow_dropout` for one of them. State is saved every `save_every` steps.
    """

    steps: int = 2000
    learning_rate: float = 3e-4
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    clips: int = 4
    frames: int = 4
    chunk: int = 4
    label_dropout: float = 0.1
    text_dropout: float = 0.05
    flow_dropout: float = 0.05
    noise_sharing: str = "shared"
    noise_share: float = 0.5
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "clips", "chunk", "save_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.frames < 0:
            raise SettingsError(f"frames must be 0 (all) or more, got {self.frames}.")
        try:
            self.sharing  # noqa: B018 (it checks mode and share)
        except ValueError as error:
            raise SettingsError(f"noise_sharing, noise_share: {error}") from error

    @property
    def sharing(self) -> NoiseSharing:
        return NoiseSharing(self.noise_sharing, self.noise_share)


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
    """

    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    alpha_bars: Tensor
    prediction_type: str
    device: torch.device
    scale: Callable[[Tensor], Tensor] = lambda latents: latents


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


class AdapterTrainer:
    """One run: an adapter, what it learns from, and a folder that the state is kept in.

    Args:
        settings: of the run.
        adapter: to train, in float32 and on the denoiser's device; the one that it holds.
        denoiser: that the adapter is for.
        clips: to learn from.
        folder: of the run. A run that is there is gone on with if `resume`, else dropped.
        between: called ahead of every chunk; may raise to stop.
        process: number of this process, where several share a step; number 0 writes.
        average: the mean of a tensor over all processes.

    Raises:
        AdapterTrainingError: clips that aren't the denoiser's, a kind of prediction that isn't
            known, or a run in the folder that has other settings or can't be read.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        adapter: FlowAdapter,
        denoiser: Denoiser,
        clips: PreparedClips,
        folder: str | Path,
        resume: bool = True,
        between: Callable[[], None] = lambda: None,
        process: int = 0,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if denoiser.prediction_type not in PREDICTION_TYPES:
            raise AdapterTrainingError(
                f"expected a model that predicts {' or '.join(PREDICTION_TYPES)}, got "
                f"{denoiser.prediction_type!r}. Train on a Stable Diffusion 1.x model."
            )
        self.settings = settings
        self.adapter = adapter.train()
        self.denoiser = denoiser
        self.clips = clips
        self.folder = RunFolder(folder)
        self.between = between
        self.process = process
        self.average = average
        self.step = 0
        self.losses: list[float] = []
        self._state = self.folder.path / "state.safetensors"
        self._saved = -1
        self._weights = dict(adapter.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._weights.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.ema = EMA(adapter, settings.ema_decay)
        self._begin(resume)

    def run(self, on_step: Callable[[AdapterTrainer], None] = lambda trainer: None) -> None:
        """Train to the end. Whatever stops it, what was learned is saved first.

        Args:
            on_step: called after each step; may raise to stop.

        Raises:
            AdapterTrainingError: the loss is no number any more, or the disk is full.
        """
        try:
            while self.step < self.settings.steps:
                self._take_step()
                on_step(self)
                if self.step % self.settings.save_every == 0:
                    self.save()
        except AdapterTrainingError:
            raise  # of what is wrong nothing is saved
        except BaseException:
            self.save()
            raise
        self.save()

    def _take_step(self) -> None:
        rate = self.settings.learning_rate * min(
            1.0, (self.step + 1) / max(1, self.settings.warmup_steps)
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        try:
            loss = self.accumulate(self.batch(self.step))
            if self.average is not None:
                loss = float(self.average(torch.tensor(loss, device=self.denoiser.device)))
                for weight in self._weights.values():
                    weight.grad = self.average(_gradient(weight))
            norm = torch.nn.utils.clip_grad_norm_(
                self._weights.values(), self.settings.gradient_clip
            )
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                raise AdapterTrainingError(
                    f"the loss is {loss} at step {self.step + 1}, and its gradient {float(norm)}. "
                    "Lower the learning rate, or train in float32; what was saved before stays, "
                    f"in {self.folder.path}."
                )
            self._optimizer.step()
            self.ema.update()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss)
        if self.process == 0:
            self._log({"step": self.step, "loss": loss, "gradient_norm": float(norm)})

    def batch(self, step: int) -> Batch:
        """What a step is made of; seed and step alone decide."""
        settings, schedule = self.settings, len(self.denoiser.alpha_bars)
        generator = step_generator(settings.seed, step, self.process)
        count = settings.clips
        chosen = torch.randint(len(self.clips), (count,), generator=generator).tolist()
        draw = torch.rand(count, generator=generator)
        both = settings.label_dropout
        text_null = draw < both + settings.text_dropout
        flow_null = draw < both
        flow_null |= ~text_null & (draw < both + settings.text_dropout + settings.flow_dropout)
        # One t in each part of the schedule: less variance than one by one.
        strata = torch.randperm(count, generator=generator)
        where = (strata + torch.rand(count, generator=generator)) / count
        timesteps = (where * schedule).long().clamp(max=schedule - 1)
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

    def accumulate(self, batch: Batch) -> float:
        """The loss of a batch, and its gradient in the adapter, summed over chunks of frames.

        The mean over clips, frames and elements of Eq. 11.
        """
        total = len(batch.latents)
        loss = torch.zeros((), device=batch.latents.device, dtype=torch.float64)
        for start in range(0, total, self.settings.chunk):
            self.between()
            rows = slice(start, min(start + self.settings.chunk, total))
            part = self._loss(batch, rows) * ((rows.stop - rows.start) / total)
            part.backward()
            loss += part.detach()
        return float(loss)

    def _loss(self, batch: Batch, rows: slice) -> Tensor:
        """The mean over these rows."""
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

    @contextmanager
    def averaged(self) -> Iterator[FlowAdapter]:
        """Within this context the adapter holds the averaged weights, and learns nothing."""
        self.adapter.eval()
        try:
            with self.ema.applied(), torch.no_grad():
                yield self.adapter
        finally:
            self.adapter.train()

    def averaged_state(self) -> dict[str, Tensor]:
        """The averaged weights, on the CPU, of a kind that any engine can load."""
        return {name: value.detach().cpu().clone() for name, value in self.ema.average.items()}

    def export(self, path: Path, base: str = "") -> None:
        """Write the averaged adapter alone, in half precision, with what it was trained on.

        base: name of the model that it was trained for.

        Raises:
            AdapterTrainingError: the disk is full, or the file can't be written.
        """
        if self.process != 0:
            return
        clips, (height, width) = self.clips, self.clips.flow_size
        kind = self.denoiser.prediction_type
        try:
            save_adapter(
                path,
                self.adapter.config,
                self.averaged_state(),
                training=AdapterTrainingConfig(base=base, clips=len(clips), steps=self.step),
                schedule=ScheduleConfig(steps=len(self.denoiser.alpha_bars), prediction_type=kind),
                resolution=(height, width),
                frames=clips.num_frames,
                data=f"{clips.folder.name} ({clips.key})",
                dtype=torch.float16,
            )
        except (OSError, SafetensorError) as error:
            raise self._full(path, error) from error

    @torch.no_grad()
    def sample(
        self, clip: int = 0, frames: int = 4, steps: int = 10, guidance: float = 3.0, seed: int = 1
    ) -> Tensor:
        """Latents of frames spread over a clip, generated from its caption and flow by DDIM.

        Text and flow are guided together, from their null labels. Averaged weights, shared noise.

        Returns:
            (frames, C, h, w) latents as the network sees them.
        """
        count = min(frames, self.clips.num_frames)
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
                prediction = torch.lerp(guided[1], guided[0], guidance)
                alpha_bar = alpha_bars[now].expand(count)
                x0 = predicted_x0(prediction, x, alpha_bar, kind)
                signal, spread = alpha_bars[now].sqrt(), (1 - alpha_bars[now]).sqrt()
                noise = (x - signal * x0) / spread
                x = alpha_bars[after].sqrt() * x0 + (1 - alpha_bars[after]).sqrt() * noise
        return x0

    def save(self) -> None:
        """Save all that is needed to go on from this very step, whole or not at all.

        Raises:
            AdapterTrainingError: the disk is full, or the folder can't be written. The state that
                was saved before stays.
        """
        if self.process != 0 or self._saved == self.step:
            return
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            tensors[f"adapter.{name}"] = weight.detach()
            tensors[f"average.{name}"] = self.ema.average[name]
            for kind, value in self._optimizer.state.get(weight, {}).items():
                tensors[f"{kind}.{name}"] = value
        packed = {name: value.cpu().contiguous() for name, value in tensors.items()}
        metadata = {"step": str(self.step), "updates": str(self.ema.updates)}
        save_tensors(self._state, packed, AdapterTrainingError, metadata)
        self._saved = self.step

    def _begin(self, resume: bool) -> None:
        """Go on with the run in the folder, or start one."""
        path = self.folder.path / "config.json"
        config = json.loads(json.dumps(self._config()))
        if resume and self._state.exists():
            self._check_same(path, config)
            self._load()
            self.folder.forget_after(self.step)
            self.losses = [record["loss"] for record in self.folder.records()]
        elif self.process == 0:
            self._state.unlink(missing_ok=True)
            self.folder.log.unlink(missing_ok=True)
        if self.process == 0:
            try:
                write_json(path, config)
            except OSError as error:
                raise self._full(self.folder.path, error) from error

    def _config(self) -> dict[str, Any]:
        return {
            "settings": to_dict(self.settings),
            "adapter": self.adapter.config.to_dict(),
            "clips": self.clips.key,
        }

    def _check_same(self, path: Path, config: dict[str, Any]) -> None:
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise self._unreadable(path, error) from error
        both = (_flat(before), _flat(config))
        names = sorted(set(both[0]) | set(both[1]))
        changed = [name for name in names if both[0].get(name) != both[1].get(name)]
        changed = [name for name in changed if name.removeprefix("settings.") not in _MAY_CHANGE]
        if changed:
            name = changed[0]
            raise AdapterTrainingError(
                f"expected the settings of the run that is in {self.folder.path}, to go on with "
                f"it, got another {name.removeprefix('settings.')}: {both[1].get(name)}, not "
                f"{both[0].get(name)}. Set it back, take another name, or don't resume."
            )

    def _load(self) -> None:
        try:
            with safe_open(self._state, framework="pt") as file:
                metadata = file.metadata() or {}
                step, updates = int(metadata["step"]), int(metadata["updates"])
                state = {name: file.get_tensor(name) for name in file.keys()}
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(state[f"adapter.{name}"])
                    self.ema.average[name].copy_(state[f"average.{name}"])
                    self._optimizer.state[weight] = {
                        kind: state[f"{kind}.{name}"].to(
                            weight.device if kind != "step" else torch.device("cpu")
                        )
                        for kind in ("step", "exp_avg", "exp_avg_sq")
                        if f"{kind}.{name}" in state
                    }
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise self._unreadable(self._state, error) from error
        self.step = self._saved = step
        self.ema.updates = updates

    def _log(self, record: dict[str, float]) -> None:
        try:
            self.folder.append(record)
        except OSError as error:
            raise self._full(self.folder.path, error) from error

    def _full(self, path: Path, error: Exception) -> AdapterTrainingError:
        return AdapterTrainingError(
            f"{path} could not be written ({error}). Make room on the disk, then run it again: it "
            f"goes on from step {max(self._saved, 0)}."
        )

    def _unreadable(self, path: Path, error: Exception) -> AdapterTrainingError:
        return AdapterTrainingError(
            f"{path}: expected the state of a run to go on with, got a file that can't be read "
            f"({error}). Take another name, or don't resume."
        )


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if type(value) is dict else {prefix + key: value}
    return found
