"""The clips of an evaluation on disk, each with its figures: a stopped run goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import replacing
from ..video.frames import from_uint8, to_uint8
from .clip_metrics import Total, pooled
from .modes import Variant


@dataclass(frozen=True)
class Task:
    """One clip of one row: the number of a clip of the data set, and the seed.

    The clip is made from noise `100000 * seed + index`.
    """

    variant: Variant
    index: int
    seed: int

    @property
    def noise_seed(self) -> int:
        return 100_000 * self.seed + self.index

    @property
    def file_name(self) -> str:
        return _file_name(self.index, self.seed)


def _file_name(index: int, seed: int) -> str:
    return f"{index:05d}_{seed}.npz"


def stored_frames(folder: Path, index: int, seed: int) -> Tensor:
    """Frames (N,3,H,W) in [0,1] that an evaluation stored: of a row's folder, a clip and a seed."""
    return read_frames(folder / _file_name(index, seed))


def as_bytes(frames: Tensor) -> np.ndarray:
    """Frames (N,3,H,W) in [0,1] as they are stored: bytes (N,H,W,3)."""
    return np.stack([to_uint8(frame) for frame in frames])


def as_frames(stored: np.ndarray) -> Tensor:
    """Bytes (N,H,W,3) to (N,3,H,W) in [0,1]."""
    return torch.stack([from_uint8(frame) for frame in stored])


def store(path: Path, frames: np.ndarray, totals: dict[str, Total], code: str) -> None:
    """Write a clip as bytes (N,H,W,3), its figures, and the version of the code that made it."""
    figures = json.dumps({name: dataclasses.astuple(total) for name, total in totals.items()})
    with replacing(path) as temporary:
        np.savez_compressed(temporary, frames=frames, totals=np.array(figures), code=np.array(code))


def read_frames(path: Path) -> Tensor:
    """Frames (N,3,H,W) in [0,1] of a stored clip."""
    with np.load(path) as stored:
        return as_frames(stored["frames"])


def read_code(path: Path) -> str:
    """Version of the project that made a clip."""
    with np.load(path) as stored:
        return str(stored["code"])


def read_totals(paths: Sequence[Path]) -> dict[str, Total]:
    """The figures of a clip's seeds together: they count as one in intervals. None of none."""
    if not paths:
        return {}
    seeds = []
    for path in paths:
        with np.load(path) as stored:
            figures = json.loads(str(stored["totals"]))
        seeds.append({name: Total(*total) for name, total in figures.items()})
    return {name: pooled(totals[name] for totals in seeds) for name in seeds[0]}
