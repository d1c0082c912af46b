"""Data sets by name: sequences of clips that a configuration chooses.

A data set whose clips may change while its settings stay the same has a `fingerprint` of them, a
string, so that clips that were prepared before are not taken for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..settings import SettingsError
from .clip import Clip
from .puppets import PuppetClips
from .videos import VideoClips


@dataclass(frozen=True)
class DataConfig:
    """Which clips. `options` goes to the data set as it is (a folder, for one).

    In a share `estimated_flow` of the clips, spread evenly, the flow is estimated from the
    frames as a user's would be, in place of the data set's own.
    """

    name: str = "puppets"
    split: str = "train"
    validation_split: str = "test"
    size: int = 128
    frames: int = 16
    takes: int = 1
    estimated_flow: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.estimated_flow <= 1:
            raise SettingsError(
                f"estimated_flow must be a share from 0 to 1, got {self.estimated_flow}."
            )


class ClipDataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


Factory = Callable[[DataConfig, str], ClipDataset]
_FACTORIES: dict[str, Factory] = {}


def register_dataset(name: str, factory: Factory) -> None:
    """Make `factory(config, split)` available as `data.name = name`."""
    _FACTORIES[name] = factory


def build_dataset(config: DataConfig, split: str | None = None) -> ClipDataset:
    """The data set that `config` names, in `split` (default: `config.split`)."""
    if config.name not in _FACTORIES:
        known = ", ".join(sorted(_FACTORIES))
        raise SettingsError(f"unknown data set {config.name!r}; known data sets: {known}.")
    return _FACTORIES[config.name](config, split or config.split)


def held_out_clips(config: DataConfig, count: int) -> list[Clip]:
    """`count` clips spread over the validation split, or all of it if it has no more."""
    data = build_dataset(config, config.validation_split)
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    return [data[index] for index in chosen.tolist()]


def _puppets(config: DataConfig, split: str) -> ClipDataset:
    settings = {"name": split, "size": config.size, "frames": config.frames, "takes": config.takes}
    known = [name for name in inspect.signature(PuppetClips).parameters if name not in settings]
    unknown = sorted(set(config.options) - set(known))
    if unknown:
        raise SettingsError(
            f"unknown option {unknown[0]!r} of the puppets; they have: {', '.join(known)}."
        )
    return PuppetClips(**settings, **config.options)


def _videos(config: DataConfig, split: str) -> ClipDataset:
    if config.takes != 1:
        raise SettingsError(f"videos have one take each, got takes = {config.takes}.")
    if set(config.options) != {"folder"}:
        given = ", ".join(config.options) or "none"
        raise SettingsError(f"videos need the option folder and no other, got {given}.")
    return VideoClips(config.options["folder"], split, size=config.size, frames=config.frames)


register_dataset("puppets", _puppets)
register_dataset("videos", _videos)
