"""The training loop that all trainers share: steps, resuming, logs, sheets, export.

A trainer supplies a `Task` (a model, a loss, a sample sheet, an export); the loop does
the rest. The randomness of a step comes from a generator seeded by (seed, step, process), never
from what ran before it, so a resumed run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..files import write_json
from ..settings import SettingsError, to_dict
from .config import TrainingConfig
from .cpu import plain_attention, speed_up
from .curves import save_curves
from .ema import EMA
from .precision import precision_on
from .run_folder import RunFolder

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What a trainer gives to the loop. `model(batch)` returns a dict of scalar losses.

    The entry `"loss"` is minimised; the others are logged.
    """

    model: nn.Module

    def compile(self) -> None:
        """Compile, in place, the parts of the model that gain from it."""

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]: ...

    def sample(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Write a sample sheet to `path` (PNG) and return figures to log."""

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the trained weights to `path` (`.safetensors`) in their final format."""


@dataclass
class Progress:
    """Where a run stands: optimiser steps made and seconds trained, over all its sessions."""

    step: int = 0
    seconds: float = 0.0

    def fraction(self, config: TrainingConfig) -> float:
        """Share of the run that is done, in [0,1], by steps or by time, whichever is further."""
        done = self.step / config.steps
        if config.max_minutes > 0:
            done = max(done, self.seconds / (60 * config.max_minutes))
        return min(done, 1.0)

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


def learning_rate(config: TrainingConfig, progress: Progress) -> float:
    """Linear warm-up, then constant or a cosine from the peak to `final_learning_rate`."""
    warm = min(1.0, (progress.step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warm
    cosine = 0.5 * (1 + math.cos(math.pi * progress.fraction(config)))
    span = config.learning_rate - config.final_learning_rate
    return warm * (config.final_learning_rate + span * cosine)


def step_generator(seed: int, *where: int) -> torch.Generator:
    """A CPU generator that depends only on the seed and the place (step, micro-step, process)."""
    state = np.random.SeedSequence([seed, *where]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def sheet_seed(number: int) -> int:
    """The seed of the noise of a sheet's picture `number`, the same at every sheet."""
    return 1000 + number


def make_accelerator(config: TrainingConfig) -> Any:
    """An `accelerate.Accelerator` for `config`; also sets threads and seeds."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import parse_flag_from_env, set_seed

    if config.threads > 0:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    # The accelerator's own state, with the device on which the precision depends. Processes wait
    # for the one that prepares the clips or draws a sheet.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    device = PartialState(cpu, timeout=timedelta(days=7)).device
    return Accelerator(
        mixed_precision=precision_on(device, config.mixed_precision),
        gradient_accumulation_steps=config.gradient_accumulation,
    )


def run_training(config: TrainingConfig, build: Callable[[torch.device], Task]) -> Progress:
    """Train what `build(device)` makes as `config` says, or go on with that run.

    Of several processes the main one builds first: it prepares the clips, the others find them.
    """
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        task = build(accelerator.device)
    return TrainingLoop(config, task, accelerator).run()


class TrainingLoop:
    """Train `task` as `config` says; an existing run in the folder is resumed."""

    def __init__(self, config: TrainingConfig, task: Task, accelerator: Any = None) -> None:
        self.config = config
        self.task = task
        self.accelerator = accelerator or make_accelerator(config)
        self.folder = RunFolder(config.output)
        self.progress = Progress()
        self.interrupted = False
        self._loss_sums: dict[str, Tensor] = {}
        self._logged_steps = 0

        if config.compile:
            task.compile()
        elif self.accelerator.device.type == "cpu":
            speed_up(task.model)
        trainable = [p for p in task.model.parameters() if p.requires_grad]
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(
            trainable,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        self.ema = EMA(self.accelerator.unwrap_model(self.model), config.ema_decay)
        self.accelerator.register_for_checkpointing(self.ema, self.progress)

    def run(self) -> Progress:
        """Train to the end or to a SIGINT or SIGTERM; the state is saved in either case."""
        from tqdm.auto import tqdm

        resumed = self._resume()
        if self.config.export_only:
            if not resumed:
                raise SettingsError(
                    f"export_only needs a run that was saved, and there is none in "
                    f"{self.folder.path}: look at the output folder, or train first."
                )
            self.export()
            if self.accelerator.is_main_process:
                self.folder.append({"step": self.progress.step})  # of the export: see training_of
            return self.progress
        if self.accelerator.is_main_process:
            write_json(self.folder.path / "config.json", to_dict(self.config))
        saved = sampled = time.monotonic()
        bar = tqdm(
            total=self.config.steps,
            initial=self.progress.step,
            desc=type(self.task).__name__,
            mininterval=5.0,
            disable=not self.accelerator.is_local_main_process,
        )
        stopped = False
        self.model.train()
        with bar, at_stop_signals(self._stop), plain_attention(self.accelerator.device):
            while self.progress.fraction(self.config) < 1 and not stopped:
                began = time.monotonic()
                losses = self._step()
                self.progress.step += 1
                now = time.monotonic()
                # Not into self.interrupted, which a signal may set at any time.
                self.progress.seconds, stopped, sheet_is_due, state_is_due = self._agreed(
                    self.progress.seconds + now - began,
                    self.interrupted,
                    now - sampled > 60 * self.config.sample_every_minutes,
                    now - saved > 60 * self.config.save_every_minutes,
                )
                bar.update()
                self._collect(losses)
                if self.progress.step % self.config.log_every == 0:
                    bar.set_postfix(loss=f"{self._write_log()['loss']:.4f}")
                if sheet_is_due:
                    self.sample()
                    self.model.train()
                    sampled = time.monotonic()
                if state_is_due:
                    self.save()
                    saved = time.monotonic()
        self.save()
        if not self.interrupted:
            self.sample()
        return self.progress

    def _agreed(self, seconds: float, *flags: bool) -> tuple[float, ...]:
        """What the main process's clock and signals say, in all processes.

        Clocks differ, and with them the learning rate and what is due; and a process that saves
        while another one trains waits for it forever.
        """
        if self.accelerator.num_processes == 1:
            return seconds, *flags
        from accelerate.utils import broadcast

        values = torch.tensor([seconds, *flags], dtype=torch.float64)
        seconds, *agreed = broadcast(values.to(self.accelerator.device)).tolist()
        return seconds, *map(bool, agreed)

    def _step(self) -> dict[str, Tensor]:
        config = self.config
        rate = learning_rate(config, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.step = 0  # a resumed run may have had another gradient_accumulation
        totals: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation):
            generator = step_generator(
                config.seed, self.progress.step, micro, self.accelerator.process_index
            )
            batch = self.task.batch(generator, self.accelerator.device)
            with self.accelerator.accumulate(self.model):
                losses = self.model(batch)
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients:
                    # Where nothing is clipped the norm is for the log.
                    norm = self.accelerator.clip_grad_norm_(
                        self.model.parameters(), config.gradient_clip or math.inf
                    )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            for loss, value in losses.items():
                part = value.detach().float() / config.gradient_accumulation
                totals[loss] = totals.get(loss, 0.0) + part
        self.ema.update()
        return {**totals, "gradient_norm": torch.as_tensor(norm)}

    def _collect(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            total = self._loss_sums.get(name, 0.0)
            self._loss_sums[name] = total + value
        self._logged_steps += 1

    def _write_log(self) -> dict[str, float]:
        record: dict[str, float] = {
            "step": self.progress.step,
            "minutes": round(self.progress.seconds / 60, 3),
            "learning_rate": learning_rate(self.config, self.progress),
        }
        for name, total in self._loss_sums.items():
            mean = self.accelerator.reduce(total / self._logged_steps, "mean")
            record[name] = float(mean)
        self._loss_sums, self._logged_steps = {}, 0
        if self.accelerator.is_main_process:
            self.folder.append(record)
        if not math.isfinite(record["loss"]):
            raise self._diverged(f"the loss is {record['loss']}")
        return record

    def _check_weights(self) -> None:
        """Before anything is written: what was saved while the run was sound stays."""
        # One bad step stays in the average for ever, so it need not be looked for at each.
        if not all(bool(average.isfinite().all()) for average in self.ema.average.values()):
            raise self._diverged("the weights are not finite")

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.progress.step}; lower the learning rate and resume from the "
            f"last state, if there is one, in {self.folder.path}."
        )

    def sample(self) -> dict[str, float]:
        """Write a sample sheet with the averaged weights, log its figures, export the weights.

        Raises:
            FloatingPointError: weights that are not finite.
        """
        self._check_weights()
        if not self.accelerator.is_main_process:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with self._averaged():
            figures = self.task.sample(
                model, self.folder.samples / f"step_{self.progress.step:07d}.png"
            )
            self.task.export(model, self.folder.export)
        minutes = round(self.progress.seconds / 60, 3)
        self.folder.append({"step": self.progress.step, "minutes": minutes, **figures})
        save_curves(self.folder.path / "curves.png", self.folder.records())
        logger.info("step %d: %s", self.progress.step, figures)
        return figures

    def save(self) -> None:
        """Save all that is needed to go on from this very step.

        Raises:
            FloatingPointError: weights that are not finite.
        """
        self._check_weights()
        if self.accelerator.is_main_process:
            self.folder.discard_new_state()
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(self.folder.new_state))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.keep_new_state()
        self.accelerator.wait_for_everyone()

    def _resume(self) -> bool:
        """Whether there was a state to go on from."""
        state = self.folder.newest_state()
        if state is None:
            return False
        self.accelerator.load_state(str(state))
        if self.accelerator.is_main_process:
            self.folder.forget_after(self.progress.step)
        logger.info("resumed %s at step %d", self.folder.path, self.progress.step)
        return True

    def export(self) -> None:
        """Write the averaged weights into the run folder, in their final format."""
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            model.eval()
            with self._averaged():
                self.task.export(model, self.folder.export)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        eager: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.config.compile:
            # Sheets see other shapes than training does: not worth compiling for.
            eager = torch.compiler.set_stance("force_eager")
        with self.ema.applied(), torch.no_grad(), eager:
            yield

    def _stop(self, number: int) -> None:
        """End the run after the step under way."""
        logger.warning("signal %d: saving the state and leaving", number)
        self.interrupted = True


@contextlib.contextmanager
def at_stop_signals(stop: Callable[[int], Any]) -> Iterator[None]:
    """Within this context SIGINT and SIGTERM call `stop` with their number, and no more."""
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda number, frame: stop(number))
    except ValueError:  # not the main thread: the caller handles signals
        logger.debug("not in the main thread: signals are left alone")
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
