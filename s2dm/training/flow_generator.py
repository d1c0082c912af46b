"""Train the flow generator of stage 1 on prepared clips (paper, section 3.4).

What it learns from and how large its error is are said here once, for two faces: ComfyUI's node
runs the trainer below, and `s2dm train stage1` runs the loop that all of its trainers share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.prepared import PreparedClips
from ..flow import FlowField, flow_to_image
from ..models import (
    Checkpoint,
    FlowGenerator,
    FlowGeneratorConfig,
    S2DMConfig,
    constrain,
    decode_flow,
    encode_flow,
    mean_motion,
    sample_as_lfdm,
    save_checkpoint,
)
from ..models.flow_generator import FLOW_CHANNELS
from ..models.presets import FLOW_GENERATORS
from ..sector import add_noise, implied_noise, predicted_x0, training_target
from ..settings import SettingsError
from ..video.frames import spread
from .loop import step_generator
from .schedule import draw_frames, draw_timesteps
from .trainer import Trainer, TrainerSettings

_MOVING = 0.01  # half-frames: what moves further sets the scale of the displacement
_CONDITIONS = ("reference", "text", "motion")
_SHOWN = 6  # frames of a clip in a preview

Batch = dict[str, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Dropouts:
    """Whole clips of a step, and the probabilities of the null labels, each drawn for itself.

    Where the motion is not given the network moves as the data do, which is the default in use:
    hence half of the time.
    """

    clips: int = 8
    reference_dropout: float = 0.1
    text_dropout: float = 0.1
    motion_dropout: float = 0.5


@dataclass(frozen=True, kw_only=True)
class FlowGeneratorSettings(Dropouts, TrainerSettings):
    """How a flow generator is trained; the network sees `chunk` clips of a step at a time."""

    learning_rate: float = 2e-4
    warmup_steps: int = 100
    chunk: int = 8


@dataclass(frozen=True)
class FlowClips:
    """What stage 1 learns from, all in memory: flow is small at the network's size.

    conditions: flow of each clip as `FlowField.condition` gives it, (C,N,3,h,w) float16.
    references: of frame 1, (C, reference_channels, h, w).
    texts: of the captions, (C, text_dim).
    choices: how many frames of each interval the conditions hold, of which a step draws one.
    """

    conditions: Tensor
    references: Tensor
    texts: Tensor
    choices: int = 1

    @property
    def num_frames(self) -> int:
        """Of a clip, as the network sees it."""
        return 1 + (self.conditions.shape[1] - 1) // self.choices

    def batch(
        self, config: FlowGeneratorConfig, settings: Dropouts, generator: torch.Generator
    ) -> Batch:
        """Some clips with noise, times and labels, all drawn from the generator; on the CPU.

        Each frame has noise of its own.
        """
        count = settings.clips
        chosen = torch.randint(len(self.conditions), (count,), generator=generator)
        timesteps = draw_timesteps(count, config.schedule.steps, generator)
        frames = [draw_frames(self.num_frames, self.choices, generator) for _ in range(count)]
        conditions = self.conditions[chosen[:, None], torch.tensor(frames)].float()
        flow = encode_flow(conditions, config)
        draw = torch.rand((3, count), generator=generator)
        return {
            "flow": flow,
            "noise": torch.randn(flow.shape, generator=generator),
            "timesteps": timesteps,
            "reference": self.references[chosen].float(),
            "text": self.texts[chosen],
            "motion": mean_motion(conditions) if config.motion_strength else None,
            "keep_reference": draw[0] >= settings.reference_dropout,
            "keep_text": draw[1] >= settings.text_dropout,
            "keep_motion": draw[2] >= settings.motion_dropout,
        }


def flow_loss(network: FlowGenerator, batch: Batch, alpha_bars: Tensor) -> Tensor:
    """The mean squared error of what the network predicts of a batch of `FlowClips`.

    alpha_bars: ᾱ_t of every timestep, (T,).
    """
    clean, noise, timesteps = batch["flow"], batch["noise"], batch["timesteps"]
    alpha_bar = alpha_bars[timesteps]
    kind = network.config.schedule.prediction_type
    prediction = network(
        add_noise(clean, noise, alpha_bar),
        timesteps,
        *(batch[name] for name in _CONDITIONS),
        **{name: batch[name] for name in (f"keep_{part}" for part in _CONDITIONS)},
    )
    target = training_target(clean, noise, alpha_bar, kind)
    return F.mse_loss(prediction.float(), target)


def read_flow_clips(
    clips: PreparedClips,
    size: tuple[int, int],
    scale: float,
    texts: Tensor,
    between: Callable[[], None] = lambda: None,
) -> FlowClips:
    """What stage 1 learns from prepared clips.

    Args:
        clips: to read.
        size: (height, width) of the flow that the network makes.
        scale: of the VAE's latents, its scaling factor.
        texts: of the captions, (C, text_dim).
        between: called ahead of every clip; may raise to stop.
    """
    frames = range(clips.num_frames)
    conditions, references = [], []
    for clip in range(len(clips)):
        between()
        conditions.append(clips.condition(clip, frames, size).half())
        references.append(clips.latents(clip, [0])[0] * scale)
    return FlowClips(torch.stack(conditions), torch.stack(references), texts)


def measure(conditions: Iterable[Tensor]) -> tuple[float, float]:
    """Root mean square displacement of what moves, and mean motion of a clip, in half-frames.

    With the first as the unit the samples have about the variance that noise has.

    Args:
        conditions: of each clip, (N,3,h,w).

    Raises:
        SettingsError: nothing moves.
    """
    squares, moving, motion, clips = 0.0, 0, 0.0, 0
    for condition in conditions:
        condition = condition.float()
        length = condition[:, :2].norm(dim=1)
        length = length[length > _MOVING]
        squares += float(length.square().sum())
        moving += len(length)
        motion += float(mean_motion(condition))
        clips += 1
    if not moving:
        raise SettingsError("stage 1 learns motion, and in these clips nothing moves.")
    return (squares / moving) ** 0.5, motion / clips


def fitted(
    network: FlowGeneratorConfig, clips: FlowClips, scale: float, motion: float
) -> FlowGeneratorConfig:
    """A network of the same size for these clips, on which `measure` found scale and motion."""
    return dataclasses.replace(
        network,
        reference_channels=clips.references.shape[1],
        text_dim=clips.texts.shape[1],
        frames=clips.num_frames,
        displacement_scale=scale,
        motion=motion,
    )


def preset_size(preset: str) -> FlowGeneratorConfig:
    """The sizes of a new network.

    Raises:
        SettingsError: no such preset.
    """
    if preset not in FLOW_GENERATORS:
        raise SettingsError(
            f"preset of a flow generator: expected one of {', '.join(FLOW_GENERATORS)}, got "
            f"{preset!r}. lfdm is the size for Stable Diffusion."
        )
    return FLOW_GENERATORS[preset]


def new_flow_generator(config: FlowGeneratorConfig, seed: int) -> FlowGenerator:
    """An untrained network, the same for a seed wherever it is made; no generator is disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlowGenerator(config)


class FlowGeneratorTrainer(Trainer):
    """A run that trains a flow generator.

    Args:
        settings: of the run.
        network: to train, in float32 and on `device`.
        data: what `read_flow_clips` made of the clips.
        clips: to learn from.
        device, folder, shared: see `Trainer`.
        dtype: that the network computes in; it learns in float32.

    Raises:
        TrainingError: a run in the folder that can't be gone on with.
    """

    def __init__(
        self,
        settings: FlowGeneratorSettings,
        network: FlowGenerator,
        data: FlowClips,
        clips: PreparedClips,
        device: torch.device,
        folder: str | Path,
        resume: bool = True,
        dtype: torch.dtype = torch.float32,
        **shared: Any,
    ) -> None:
        self.settings = settings
        self.network = network
        self.data = data
        self.dtype = dtype
        self._alpha_bars = network.config.schedule.alphas_cumprod().to(device)
        networks = {"flow_generator": network}
        super().__init__(settings, networks, clips, device, folder, resume, **shared)

    def identity(self) -> dict[str, Any]:
        """See `Trainer`."""
        return {"flow_generator": self.network.config.to_dict(), "clips": self.clips.key}

    def batch(self, step: int) -> Batch:
        """What a step is made of; seed and step alone decide."""
        # The 0 is the loop's number of a part of a step, so that both draw the same.
        generator = step_generator(self.settings.seed, step, 0, self.process)
        batch = self.data.batch(self.network.config, self.settings, generator)
        return {
            name: part if part is None else part.to(self.device) for name, part in batch.items()
        }

    def size(self, batch: Batch) -> int:
        """Clips."""
        return len(batch["flow"])

    def loss(self, batch: Batch, rows: slice) -> Tensor:
        """The mean over these clips."""
        here = {name: None if part is None else part[rows] for name, part in batch.items()}
        with self._half():
            return flow_loss(self.network, here, self._alpha_bars)

    def _half(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    @torch.no_grad()
    def sample(self, clip: int = 0, steps: int = 20, seed: int = 1) -> FlowField:
        """The flow of a clip as the averaged weights make it of its first frame and its caption.

        Returns:
            A field of the network's frames and size.
        """
        config = self.network.config
        shape = (1, config.frames, FLOW_CHANNELS, *config.size)
        generator = torch.Generator().manual_seed(seed)
        kind, device = config.schedule.prediction_type, self.device
        reference = self.data.references[clip : clip + 1].float().to(device)
        text = self.data.texts[clip : clip + 1].to(device)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        def seen(x_t: Tensor, time: int) -> tuple[Tensor, Tensor]:
            self.between()
            with self._half():
                prediction = self.network(x_t, torch.tensor([time], device=device), reference, text)
            prediction, alpha_bar = prediction.float(), self._alpha_bars[time]
            return (
                predicted_x0(prediction, x_t, alpha_bar, kind),
                implied_noise(prediction, x_t, alpha_bar, kind),
            )

        with self.averaged():
            sample = sample_as_lfdm(
                seen, draw(), config.schedule, steps, lambda x0: constrain(x0, config), draw
            )
        return decode_flow(sample[0].cpu(), config, *config.size)

    def picture(self, clip: int = 0) -> Tensor:
        """Flow of a clip in colours, the true one above what is made now, (3, h, w) in [0,1]."""
        size = self.network.config.size
        true = FlowField.from_condition(self.data.conditions[clip].float(), *size)
        made = self.sample(clip)
        scale = max(true.magnitude().max().item(), 1e-6)
        keep = spread(len(true), min(_SHOWN, len(true)))
        rows = [torch.cat([*flow_to_image(flow.select(keep), scale)], -1) for flow in (true, made)]
        return torch.cat(rows, dim=1)

    def export(self, path: Path) -> None:
        """Write the averaged network alone, in half precision, with what it was trained on.

        Raises:
            TrainingError: the disk is full, or the file can't be written.
        """
        if self.process != 0:
            return
        clips = self.clips
        told = f"{clips.folder.name} ({clips.key}): {len(clips)} clips, {self.step} steps"
        config = S2DMConfig(
            flow_generator=self.network.config,
            resolution=clips.flow_size,
            frames=clips.num_frames,
            data=told,
        )
        states = {"flow_generator": self.averaged_state("flow_generator")}
        with self.writing(path):
            save_checkpoint(path, Checkpoint(config, states), torch.float16)
