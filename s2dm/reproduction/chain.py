"""A chain of steps, each done once: a stopped chain goes on where it was."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from ..settings import SettingsError

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A step was stopped, and goes on with the same command."""


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    name: of its mark, `steps/NAME.json` in the output folder.
    title: what it does, in a few words.
    run: does it, or goes on with it; raises `Interrupted` where it was stopped in between.
    settings: all that decides about what it makes, as plain JSON values.
    needs: names of the steps whose results it takes. Their settings count as its own.
    """

    name: str
    title: str
    run: Callable[[], None]
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()


class Chain:
    """Steps in an order in which each comes after those it needs.

    Raises:
        SettingsError: a step was begun with other settings: what it left is for those.
    """

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder, self.steps = folder, steps
        self._settings: dict[str, Any] = {}
        for step in steps:
            before = {name: self._settings[name] for name in step.needs}
            # As JSON has them: lists for tuples, and so on.
            own = json.loads(json.dumps(step.settings, default=str))
            self._settings[step.name] = {"own": own, "needs": before}
        for step in steps:
            self._check(step)

    def is_done(self, step: Step) -> bool:
        return bool(self._mark(step).get("done"))

    def run(self, only: Iterable[str] | None = None) -> None:
        """Run what isn't done yet, in order; `only` some of the steps."""
        chosen = None if only is None else set(only)
        for number, step in enumerate(self.steps, start=1):
            if self.is_done(step) or (chosen is not None and step.name not in chosen):
                continue
            self._expect_done(step)
            logger.info("Step %d of %d: %s", number, len(self.steps), step.title)
            began = time.monotonic()
            mark = {"settings": self._settings[step.name], "done": False}
            write_json(self._path(step), mark)
            step.run()
            minutes = round((time.monotonic() - began) / 60, 2)
            write_json(self._path(step), {**mark, "done": True, "last_minutes": minutes})

    def _expect_done(self, step: Step) -> None:
        by_name = {one.name: one for one in self.steps}
        lacking = [name for name in step.needs if not self.is_done(by_name[name])]
        if lacking:
            raise SettingsError(
                f"the step {step.name} needs {', '.join(lacking)}, which isn't done: leave out "
                "--only, or name it too."
            )

    def _check(self, step: Step) -> None:
        mark = self._mark(step)
        if mark and mark["settings"] != self._settings[step.name]:
            raise SettingsError(
                f"the step {step.name} in {self.folder} was begun with other settings, which "
                f"{self._path(step)} has. Give another output folder; or delete that file, those "
                "of the steps that need it, and the folders they wrote."
            )

    def _path(self, step: Step) -> Path:
        return self.folder / "steps" / f"{step.name}.json"

    def _mark(self, step: Step) -> dict[str, Any]:
        path = self._path(step)
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
