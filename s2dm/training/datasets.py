"""Data sets by name. A data set is a sequence of clips; trainers know nothing else about it.

A clip has ``frames`` (N,3,H,W), uint8 or float in [0,1]; ``flow``, a
:class:`~s2dm.flow.FlowField` from each frame back to the first; and ``caption``, a string. A data
set whose clips may change while its settings stay the same has a ``fingerprint`` of them, a string,
so that clips that were prepared before are not taken for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import DataConfig, TrainingConfigError


class ClipDataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


Factory = Callable[[DataConfig, str], ClipDataset]
_FACTORIES: dict[str, Factory] = {}


def register_dataset(name: str, factory: Factory) -> None:
    """Make ``factory(config, split)`` available to the trainers as ``data.name = name``."""
    _FACTORIES[name] = factory


def build_dataset(config: DataConfig, split: str | None = None) -> ClipDataset:
    """The data set that ``config`` names, in ``split`` (default: ``config.split``)."""
    if config.name not in _FACTORIES:
        known = ", ".join(sorted(_FACTORIES))
        raise TrainingConfigError(f"unknown data set {config.name!r}; known data sets: {known}.")
    return _FACTORIES[config.name](config, split or config.split)


def held_out_clips(config: DataConfig, count: int) -> list[Any]:
    """``count`` clips spread over the validation split, or all of it if it has no more."""
    data = build_dataset(config, config.validation_split)
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    return [data[index] for index in chosen.tolist()]


def pixels(frames: Tensor) -> Tensor:
    """A clip's frames as float32 in [0,1], whether they came as bytes or floats."""
    if frames.is_floating_point():
        return frames.float()
    return frames.float() / 255


def _puppets(config: DataConfig, split: str) -> ClipDataset:
    from ..data.puppets import PuppetClips

    settings = {"name": split, "size": config.size, "frames": config.frames, "takes": config.takes}
    known = [name for name in inspect.signature(PuppetClips).parameters if name not in settings]
    unknown = sorted(set(config.options) - set(known))
    if unknown:
        raise TrainingConfigError(
            f"unknown option {unknown[0]!r} of the puppets; they have: {', '.join(known)}."
        )
    return PuppetClips(**settings, **config.options)


def _videos(config: DataConfig, split: str) -> ClipDataset:
    from ..data.videos import VideoClips

    if config.takes != 1:
        raise TrainingConfigError(f"videos have one take each, got takes = {config.takes}.")
    if set(config.options) != {"folder"}:
        given = ", ".join(config.options) or "none"
        raise TrainingConfigError(f"videos need the option folder and no other, got {given}.")
    return VideoClips(config.options["folder"], split, size=config.size, frames=config.frames)


register_dataset("puppets", _puppets)
register_dataset("videos", _videos)
