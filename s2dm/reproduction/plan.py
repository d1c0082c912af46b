"""What the chain will take: work counted on networks without data, speed measured here."""

from __future__ import annotations

import dataclasses
import time as clock
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..data import build_dataset
from ..models import FlowGenerator, S2DMConfig, read_config
from ..models.checkpoint import CheckpointError
from ..models.presets import SD15
from ..pipelines.modules import build_flow_generator, build_unet, build_vae
from ..training.cache import CONDITION_SIZE, clip_to_prepare
from ..training.stage1 import new_size

if TYPE_CHECKING:
    from .experiment import Experiment

_SHARE = 0.4
"""Of the speed of large matrix products, what networks reach."""
_BACKWARD = 3  # a step of training, in forward passes: one there and two back
_ADAM = 16  # bytes a parameter: itself, its gradient and two moments, in float32


@dataclass(frozen=True)
class Cost:
    """About what a step takes: hours here, GB of memory beside activations, GB on disk."""

    hours: float = 0.0
    memory: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The steps with their costs and which are done."""

    rows: list[tuple[str, str, bool, Cost]]
    device: str

    def text(self) -> str:
        """A table to read ahead of days of work."""
        lines = [f"{'step':<22}{'hours':>8}{'memory':>10}{'disk':>10}  what"]
        for name, title, done, cost in self.rows:
            hours = "done" if done else _hours(cost.hours)
            lines.append(
                f"{name:<22}{hours:>8}{_size(cost.memory):>10}{_size(cost.disk):>10}  {title}"
            )
        left = sum(cost.hours for _, _, done, cost in self.rows if not done)
        lines.append(
            f"About {_hours(left)} hours are left on {self.device}: counted operations, at "
            f"{_SHARE:.0%} of the speed of its matrix products. Memory is weights, gradients and "
            "optimiser in GB; activations come on top."
        )
        return "\n".join(lines)


def make_plan(experiment: Experiment) -> Plan:
    """Count what each step computes and stores."""
    device = torch.device("cuda" if torch.cuda.is_available() and not experiment.cpu else "cpu")
    config = _start_config(experiment)
    work = _Work(experiment, config)
    speed = _SHARE * matrix_speed(device) * 3600
    costs: dict[str, Callable[[], Cost]] = {
        "start": lambda: Cost(0.0, 0.0, 4e-9 * work.parameters),
        "clips": work.clips,
        "vae": lambda: work.vae(speed),
        "stage2": lambda: work.stage2(experiment.stage2, speed),
        "stage2_independent": lambda: work.stage2(experiment.stage2_independent, speed),
        "stage1": lambda: work.stage1(speed),
        "lfdm": lambda: Cost(0.0, 0.0, 4e-9 * (work.parameters + work.flow)),
        **{
            f"evaluate_{name}": partial(work.evaluation, name, speed)
            for name in experiment.evaluations
        },
    }
    rows = [
        (step.name, step.title, experiment.chain.is_done(step), costs.get(step.name, Cost)())
        for step in experiment.chain.steps
    ]
    return Plan(rows, str(device))


class _Work:
    """Operations and bytes of the steps, for a start of so many parameters."""

    def __init__(self, experiment: Experiment, config: S2DMConfig) -> None:
        self.experiment = experiment
        self.size, self.frames = experiment.data.size, experiment.data.frames
        self.data = build_dataset(experiment.data, "train")
        self.count = len(self.data)
        self.stored = 1 + (self.frames - 1) * getattr(self.data, "choices", 1)  # frames of a clip
        cells = self.size // config.vae.factor
        channels = config.vae.latent_channels
        self.latent_bytes = 2 * channels * cells**2
        latents = torch.zeros(1, channels, cells, cells, device="meta")
        with torch.device("meta"):
            unet, vae = build_unet(config.unet), build_vae(config.vae)
            sizes = config.flow_generator or dataclasses.replace(
                new_size(experiment.stage1.preset, config),
                reference_channels=channels,
                text_dim=config.text_encoder.hidden_size,
            )
            network = build_flow_generator(sizes)
            text = torch.zeros(1, 77, config.unet.context_dim)
            picture = torch.zeros(1, 3, self.size, self.size)
            self.encode = operations(lambda: vae.encode(picture))
            self.decode = operations(lambda: vae.decode(latents))
            self.denoise = operations(lambda: unet(latents, torch.zeros(1), text))
            self.generate = flow_operations(network, self.frames)
        counts = [sum(p.numel() for p in part.parameters()) for part in (unet, vae, network)]
        self.unet, self.autoencoder, self.flow = counts
        self.parameters = self.unet + self.autoencoder

    def clips(self) -> Cost:
        began = clock.monotonic()
        clip_to_prepare(self.data, 0)
        seconds = (clock.monotonic() - began) * self.count
        frame = 3 * self.size**2 + 6 * CONDITION_SIZE[0] * CONDITION_SIZE[1] + self.latent_bytes
        hours = seconds / 3600 / max(1, self.experiment.stage2.workers)
        return Cost(hours, 0.0, 1e-9 * self.count * self.stored * frame)

    def vae(self, speed: float) -> Cost:
        config = self.experiment.vae
        pixels = config.batch_size * min(config.crop, self.size) ** 2
        passes = config.steps * pixels / self.size**2 * _BACKWARD
        hours = passes * (self.encode + self.decode) / speed
        return Cost(hours, 1e-9 * _ADAM * self.autoencoder, 1e-9 * 16 * self.autoencoder)

    def stage2(self, config: Any, speed: float) -> Cost:
        again = 1 if config.gradient_checkpointing else 0
        frames = config.steps * config.clips * config.clip_frames * config.gradient_accumulation
        encoding = self.count * self.stored * self.encode
        hours = (frames * (_BACKWARD + again) * self.denoise + encoding) / speed
        learned = _ADAM * self.unet + 4 * self.autoencoder
        return Cost(hours, 1e-9 * learned, 1e-9 * (12 * self.unet + 2 * self.parameters))

    def stage1(self, speed: float) -> Cost:
        config = self.experiment.stage1
        hours = config.steps * config.clips * _BACKWARD * self.generate / speed
        return Cost(hours, 1e-9 * _ADAM * self.flow, 1e-9 * (12 * self.flow + 2 * self.parameters))

    def evaluation(self, name: str, speed: float) -> Cost:
        config = self.experiment.evaluation(name)
        recommended = {**self.experiment.stage2.sampling, **config.sampling}
        steps, guidance = recommended["steps"], recommended.get("guidance_scale", 7.5)
        frame = steps * (1 if guidance == 1 else 2) * self.denoise + self.decode
        video = self.frames * frame
        flow = sum(v.stage_1 for v in config.variants) * config.flow_sampling.steps * self.generate
        hours = config.videos * (len(config.variants) * video + flow) / speed
        disk = config.videos * len(config.variants) * self.frames * 3 * self.size**2
        return Cost(hours, 4e-9 * (self.parameters + self.flow), 1e-9 * disk)


def flow_operations(network: FlowGenerator, num_frames: int) -> float:
    """Floating-point operations of one call for a clip, of a network without data."""
    config = network.config
    with torch.device("meta"):
        sample = torch.zeros(1, num_frames, 3, *config.size)
        time = torch.zeros(1, dtype=torch.long)
        reference = torch.zeros(1, config.reference_channels, *config.size)
        text = torch.zeros(1, config.text_dim)
        motion = torch.zeros(1) if config.motion_strength else None
        return operations(lambda: network(sample, time, reference, text, motion))


def operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of a call of networks without data."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return float(counter.get_total_flops())


def matrix_speed(device: torch.device, side: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second in products of square matrices in float32."""
    a = torch.ones(side, side, device=device)
    _ = (a @ a).sum().item()
    began, count = clock.monotonic(), 0
    while (passed := clock.monotonic() - began) < seconds:
        a = (a @ a) * 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return 2 * side**3 * count / passed


def _start_config(experiment: Experiment) -> S2DMConfig:
    """Of a checkpoint of ours; Stable Diffusion's for anything else that converts."""
    for path in (experiment.sd15, experiment.start):
        if path.is_file() and path.suffix == ".safetensors":
            try:
                return read_config(path)
            except CheckpointError:
                continue
    return SD15


def _hours(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _size(value: float) -> str:
    return f"{value:.1f} GB" if value else "–"
