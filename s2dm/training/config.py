"""Settings of a training run: dataclasses read from TOML or JSON files and the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..files import read_text

C = TypeVar("C")


class TrainingConfigError(ValueError):
    """A training setting that is unknown, of the wrong type or out of range."""


@dataclass(frozen=True)
class DataConfig:
    """Which clips to train on. ``options`` goes to the data set as it is (a folder, for one).

    In a share ``estimated_flow`` of the clips, spread evenly, the flow is estimated from the
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
            raise TrainingConfigError(
                f"estimated_flow must be a share from 0 to 1, got {self.estimated_flow}."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every trainer shares. A run ends at ``steps`` or ``max_minutes``, whichever is first.

    ``output`` is the run folder; ``cache`` (default ``<output>/cache``) holds the prepared data
    and may be shared by several runs. ``max_minutes`` = 0 means no limit of time; the learning
    rate is annealed over whichever of the two is nearer its end. ``threads`` = 0 leaves PyTorch's
    number of CPU threads alone. ``compile`` runs the networks through torch.compile, which takes
    minutes to start. With
    ``export_only`` an existing run writes its averaged weights and does not go on.
    """

    output: str = "runs/training"
    cache: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 100_000
    max_minutes: float = 0.0
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.0
    warmup_steps: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    gradient_accumulation: int = 1
    ema_decay: float = 0.999
    mixed_precision: str = "bf16"
    compile: bool = False
    threads: int = 0
    workers: int = 2
    seed: int = 0
    export_only: bool = False
    log_every: int = 20
    sample_every_minutes: float = 5.0
    save_every_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise TrainingConfigError(
                f"schedule must be 'cosine' or 'constant', got {self.schedule!r}."
            )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise TrainingConfigError(
                f"mixed_precision must be 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}."
            )
        for name in ("steps", "gradient_accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise TrainingConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


def config_from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
    """Build a (nested) config dataclass, naming any setting that is unknown or mistyped."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise TrainingConfigError(
            f"unknown setting {where}{unknown[0]!r}; {cls.__name__} has: {', '.join(known)}."
        )
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TrainingConfigError(f"{where} must be a table, got {value!r}.")
        return config_from_dict(kind, value, where + ".")
    origin = typing.get_origin(kind)
    if origin is tuple:
        inner = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise TrainingConfigError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(inner, item, where) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or kind
    if expected is Any or (
        isinstance(value, expected) and not (expected is not bool and isinstance(value, bool))
    ):
        return value
    raise TrainingConfigError(f"{where} must be of type {expected.__name__}, got {value!r}.")


def read_settings(cls: type[C], path: str | Path | None, overrides: list[str] = ()) -> C:
    """Read a config file (``.toml`` or ``.json``) and apply ``key=value`` overrides.

    A dotted key reaches into a table (``data.takes=2``). Values are read as JSON and, where that
    fails, as plain text.
    """
    values = _read_file(Path(path)) if path else {}
    for override in overrides or ():
        key, equals, text = override.partition("=")
        if not equals:
            raise TrainingConfigError(f"an override is written key=value, got {override!r}.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *tables, name = key.split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
        target[name] = value
    return config_from_dict(cls, values)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TrainingConfigError(f"there is no training config at {path}.")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = read_text(path)
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingConfigError(f"{path}: {error}.") from error
    if not isinstance(values, dict):
        raise TrainingConfigError(f"{path}: settings must be an object, got {values!r}.")
    return values


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values, readable again by :func:`config_from_dict`."""
    return dataclasses.asdict(config)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options that every trainer takes to a command-line parser."""
    parser.add_argument("--config", help="training config, .toml or .json")
    parser.add_argument("--output", help="run folder; an existing run is resumed")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, for example --set data.takes=2 (may be repeated)",
    )


def config_from_arguments(cls: type[C], arguments: Namespace) -> C:
    """The config that the options of :func:`add_arguments` describe."""
    overrides = list(arguments.overrides)
    if arguments.output:
        overrides.append(f"output={json.dumps(str(arguments.output))}")
    return read_settings(cls, arguments.config, overrides)
