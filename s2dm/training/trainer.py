"""A run that learns from prepared clips: its steps, and its state on disk.

Unlike `loop` it knows no accelerate, which isn't there in ComfyUI, and leaves devices and data to
whoever calls it. What learns, what a step is made of and what is written in the end is for
subclasses to say.

Seed and step alone decide what a step draws, and the state on disk holds all else, so a run that
was stopped goes on with the losses of one that never was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data.prepared import PreparedClips
from ..files import save_tensors, write_json
from ..settings import SettingsError, to_dict
from .ema import EMA
from .run_folder import RunFolder

_MAY_CHANGE = {"steps", "chunk", "save_every"}
"""Settings that a run may go on with others of: they change nothing that was done."""


class TrainingError(ValueError):
    """Training that can't start or go on; the message says why, and what to change."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What all runs on prepared clips share.

    A step takes `clips` clips; `chunk` says how much is computed at a time, which changes memory
    alone. State is saved every `save_every` steps.
    """

    steps: int = 2000
    learning_rate: float = 3e-4
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    clips: int = 4
    chunk: int = 4
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "clips", "chunk", "save_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Trainer:
    """One run: networks that learn, the clips they learn from, and a folder for the state.

    Args:
        settings: of the run.
        networks: that learn, by names for the state; in float32 and on `device`.
        clips: to learn from.
        device: of the networks.
        folder: of the run. A run that is there is gone on with if `resume`, else dropped.
        between: called ahead of every chunk; may raise to stop.
        process: number of this process, where several share a step; number 0 writes.
        average: the mean of a tensor over all processes.

    Raises:
        TrainingError: a run in the folder that has other settings or can't be read.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        networks: Mapping[str, nn.Module],
        clips: PreparedClips,
        device: torch.device,
        folder: str | Path,
        resume: bool = True,
        between: Callable[[], None] = lambda: None,
        process: int = 0,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.clips = clips
        self.device = device
        self.folder = RunFolder(folder)
        self.between = between
        self.process = process
        self.average = average
        self.step = 0
        self.losses: list[float] = []
        self._run = settings
        self._networks = nn.ModuleDict(networks).train()
        self._state = self.folder.path / "state.safetensors"
        self._saved = -1
        self._weights = dict(self._networks.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._weights.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.ema = EMA(self._networks, settings.ema_decay)
        self._begin(resume)

    def accumulate(self, batch: Any) -> float:
        """The loss of a batch, and its gradient in the networks, summed over chunks of its rows."""
        total = self.size(batch)
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        for start in range(0, total, self._run.chunk):
            self.between()
            rows = slice(start, min(start + self._run.chunk, total))
            part = self.loss(batch, rows) * ((rows.stop - rows.start) / total)
            part.backward()
            loss += part.detach()
        return float(loss)

    def size(self, batch: Any) -> int:
        """How many rows a batch has."""
        raise NotImplementedError

    def loss(self, batch: Any, rows: slice) -> Tensor:
        """The mean loss of some rows of a batch, a scalar with its gradient."""
        raise NotImplementedError

    def batch(self, step: int) -> Any:
        """What a step is made of; seed and step alone decide."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a run that goes on has to have in common with the one that was, beside settings."""
        raise NotImplementedError

    def run(self, on_step: Callable[[Any], None] = lambda trainer: None) -> None:
        """Train to the end. Whatever stops it, what was learned is saved first.

        Args:
            on_step: called with the trainer after each step; may raise to stop.

        Raises:
            TrainingError: the loss is no number any more, or the disk is full.
        """
        try:
            while self.step < self._run.steps:
                self._take_step()
                on_step(self)
                if self.step % self._run.save_every == 0:
                    self.save()
        except TrainingError:
            raise  # of what is wrong nothing is saved
        except BaseException:
            self.save()
            raise
        self.save()

    def _take_step(self) -> None:
        settings = self._run
        rate = settings.learning_rate * min(1.0, (self.step + 1) / max(1, settings.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        try:
            loss = self.accumulate(self.batch(self.step))
            if self.average is not None:
                loss = float(self.average(torch.tensor(loss, device=self.device)))
                for weight in self._weights.values():
                    weight.grad = self.average(_gradient(weight))
            norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), settings.gradient_clip)
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                raise TrainingError(
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

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the networks hold the averaged weights, and learn nothing."""
        self._networks.eval()
        try:
            with self.ema.applied(), torch.no_grad():
                yield
        finally:
            self._networks.train()

    def averaged_state(self, network: str) -> dict[str, Tensor]:
        """The averaged weights of a network, on the CPU, of a kind that any engine can load."""
        prefix = f"{network}."
        return {
            name.removeprefix(prefix): value.detach().cpu().clone()
            for name, value in self.ema.average.items()
            if name.startswith(prefix)
        }

    def save(self) -> None:
        """Save all that is needed to go on from this very step, whole or not at all.

        Raises:
            TrainingError: the disk is full, or the folder can't be written. The state that was
                saved before stays.
        """
        if self.process != 0 or self._saved == self.step:
            return
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            tensors[f"weight.{name}"] = weight.detach()
            tensors[f"average.{name}"] = self.ema.average[name]
            for kind, value in self._optimizer.state.get(weight, {}).items():
                tensors[f"{kind}.{name}"] = value
        packed = {name: value.cpu().contiguous() for name, value in tensors.items()}
        metadata = {"step": str(self.step), "updates": str(self.ema.updates)}
        save_tensors(self._state, packed, TrainingError, metadata)
        self._saved = self.step

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Name the file that can't be written within this context.

        Raises:
            TrainingError: the disk is full, or the file can't be written.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path} could not be written ({error}). Make room on the disk, then run it "
                f"again: it goes on from step {max(self._saved, 0)}."
            ) from error

    def _begin(self, resume: bool) -> None:
        """Go on with the run in the folder, or start one."""
        path = self.folder.path / "config.json"
        config = json.loads(json.dumps({"settings": to_dict(self._run), **self.identity()}))
        self._check_kind(path, config)
        if resume and self._state.exists():
            self._check_same(path, config)
            self._load()
            if self.process == 0:
                self.folder.forget_after(self.step)
            self.losses = [r["loss"] for r in self.folder.records() if r["step"] <= self.step]
        elif self.process == 0:
            self._state.unlink(missing_ok=True)
            self.folder.log.unlink(missing_ok=True)
        if self.process == 0:
            with self.writing(self.folder.path):
                write_json(path, config)

    def _check_kind(self, path: Path, config: dict[str, Any]) -> None:
        """Starting anew, too, would write over what a run of another kind has made."""
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return  # there is none, or none that can be gone on with, which is said then
        if others := sorted(set(before) - set(config)):
            raise TrainingError(
                f"expected a run of the same kind in {self.folder.path}, got one that trains the "
                f"{others[0].replace('_', ' ')}. Take another name."
            )

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
            raise TrainingError(
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
                    weight.copy_(state[f"weight.{name}"])
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
        with self.writing(self.folder.path):
            self.folder.append(record)

    def _unreadable(self, path: Path, error: Exception) -> TrainingError:
        return TrainingError(
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
