"""The folder of a training run: its settings, log, states, sheets and exported weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import read_json_lines, write_json, write_text
from .config import TrainingConfig


class RunFolder:
    """The files of one run: `config.json`, what was `measured_once`, `log.jsonl`,
    `curves.png`, `state/`, `samples/` and `export.safetensors`. All but the log, which
    grows, are written under a temporary name and renamed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples = self.path / "samples"
        self.state = self.path / "state"
        self.new_state = self.path / "state.new"
        self._old_state = self.path / "state.old"
        self.log = self.path / "log.jsonl"
        self.export = self.path / "export.safetensors"
        self.samples.mkdir(parents=True, exist_ok=True)

    def records(self) -> list[dict[str, float]]:
        if not self.log.exists():
            return []
        return read_json_lines(self.log)

    def append(self, record: dict[str, float]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the log entries past `step`, which a resumed run is about to make again."""
        kept = [r for r in self.records() if r["step"] <= step]
        write_text(self.log, "".join(json.dumps(r) + "\n" for r in kept))

    def newest_state(self) -> Path | None:
        """The state to resume from. A crash while renaming leaves the one before it."""
        for candidate in (self.state, self._old_state):
            if candidate.exists():
                return candidate
        return None

    def discard_new_state(self) -> None:
        """Remove what a run left that broke off while it saved."""
        _remove(self.new_state)

    def keep_new_state(self) -> None:
        """Put what was saved in `new_state` in place of the state before it."""
        if self.state.exists():
            _remove(self._old_state)
            self.state.rename(self._old_state)
        self.new_state.rename(self.state)
        _remove(self._old_state)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def measured_once(config: TrainingConfig, name: str, measure: Callable[[], Any]) -> Any:
    """What a run measured on its clips when it began, as plain JSON values.

    A run that goes on keeps it, whatever clips were added since: its weights are made for it.
    """
    folder = RunFolder(config.output)
    path = folder.path / f"{name}.json"
    if folder.newest_state() is None or not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text("utf-8"))


def training_of(export: Path) -> tuple[dict[str, Any], int] | None:
    """Settings of the run that wrote `export.safetensors`, and the steps it had made then.

    None where the files of the run don't lie beside it.
    """
    config, log = (export.with_name(name) for name in ("config.json", "log.jsonl"))
    if not (config.exists() and log.exists()):
        return None
    # The weights are exported with every sheet, whose figures have a record of their own.
    steps = [record["step"] for record in read_json_lines(log) if "loss" not in record]
    return json.loads(config.read_text(encoding="utf-8")), max(steps, default=0)
