"""Data sets by name: sequences of clips that a configuration chooses.

A data set whose clips may change while its settings stay the same has a `fingerprint` of them, a
string, so that clips that were prepared before are not taken for them. One whose clips have
`labels(index)`, the class and the subject of each, is evaluated by class and by subject too. One
whose later frames training may draw anew has `choices` and `pool(index)`, see `RecordedClips`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..settings import SettingsError, from_dict
from . import mhad, mug
from .clip import Clip
from .puppets import PuppetClips
from .recordings import TABLES, Protocol, RecordedClips, Recording, Words
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


class ClipDataset(typing.Protocol):
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
    return PuppetClips(**settings, **_options(config, PuppetClips, settings))


def _videos(config: DataConfig, split: str) -> ClipDataset:
    settings = {"name": split, "size": config.size, "frames": config.frames, "takes": config.takes}
    options = _options(config, VideoClips, settings)
    if "folder" not in options:
        given = ", ".join(config.options) or "none"
        raise SettingsError(f"videos need the option folder, got {given}.")
    return VideoClips(**settings, **options)


def _options(config: DataConfig, kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a data set has beside the settings that all have."""
    known = [name for name in inspect.signature(kind).parameters if name not in settings]
    unknown = sorted(set(config.options) - set(known))
    if unknown:
        raise SettingsError(
            f"unknown option {unknown[0]!r} of {config.name}; it has: {', '.join(known)}."
        )
    return config.options


@dataclass(frozen=True, kw_only=True)
class RecordedOptions:
    """Options of `mhad` and `mug`.

    folder: of the data set's files, as they were published.
    table: of the words in captions (TOML); by default the one that the package comes with.
    seed: of the split, and of the frames that are drawn.
    held_out_combinations, held_out_clips: -1 for the paper's numbers; 0 clips for any number.
    flow: "dis", "farneback", "raft_large", "raft_small", or the path of a checkpoint with a
        region-motion model.
    frame_sampling, frame_choices: "even" or "random", see `RecordedClips`.
    """

    folder: str
    table: str = ""
    seed: int = 0
    held_out_combinations: int = -1
    held_out_clips: int = -1
    flow: str = "dis"
    frame_sampling: str = "even"
    frame_choices: int = 1


def _mhad(config: DataConfig, split: str) -> ClipDataset:
    return _recorded(config, split, mhad.find_mhad, mhad.PROTOCOL, window=mhad.WINDOW)


def _mug(config: DataConfig, split: str) -> ClipDataset:
    return _recorded(config, split, mug.find_mug, mug.PROTOCOL)


def _recorded(
    config: DataConfig,
    split: str,
    find: Callable[[str], list[Recording]],
    protocol: Protocol,
    **more: Any,
) -> ClipDataset:
    if "folder" not in config.options:
        raise SettingsError(f"{config.name} needs the option folder, where its files are.")
    options = from_dict(RecordedOptions, config.options, "data.options.")
    asked = {
        name: value
        for name in ("held_out_combinations", "held_out_clips")
        if (value := getattr(options, name)) >= 0
    }
    return RecordedClips(
        find(options.folder),
        Words.read(Path(options.table or TABLES / f"{config.name}.toml")),
        replace(protocol, **asked),
        split,
        size=config.size,
        frames=config.frames,
        takes=config.takes,
        seed=options.seed,
        sampling=options.frame_sampling,
        choices=options.frame_choices,
        flow=options.flow,
        **more,
    )


register_dataset("puppets", _puppets)
register_dataset("videos", _videos)
register_dataset("mhad", _mhad)
register_dataset("mug", _mug)
