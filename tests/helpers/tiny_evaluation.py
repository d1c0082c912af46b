"""An evaluation of a few tiny clips, and what is counted of it."""

from __future__ import annotations

from pathlib import Path

from s2dm.data import DataConfig
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.run import EvaluationConfig

DATA = DataConfig(size=32, frames=3)


def tiny_evaluation(checkpoint: Path, output: Path) -> EvaluationConfig:
    return EvaluationConfig(
        checkpoint=checkpoint,
        output=output,
        data=DATA,
        clips=2,
        variants=(Variant("given-flow"), Variant("true")),
        sampling={"steps": 1},
        cpu=True,
    )


def count_made(monkeypatch) -> list[tuple[str, str]]:
    """Every clip that is made, by its row and caption, in order."""
    calls = []
    make = Variant.make

    def counted(self, generator, clip, seed):
        calls.append((str(self), clip.caption))
        return make(self, generator, clip, seed)

    monkeypatch.setattr(Variant, "make", counted)
    return calls
