"""Settings: frozen dataclasses from dictionaries, TOML and JSON files and the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .files import read_text

C = TypeVar("C")


class SettingsError(ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


def from_dict(cls: type[C], values: Any, where: str = "", check_types: bool = True) -> C:
    """Build a dataclass, and those in it, from dictionaries; lists become tuples.

    Args:
        cls: the dataclass. Missing entries take their defaults.
        values: a dictionary.
        where: path to it, for messages, such as "data.".
        check_types: whether values have to be of the types that the fields are annotated with;
            without, that is left to the dataclass itself.

    Raises:
        SettingsError: values are no dictionary, an entry is unknown or of the wrong type.
    """
    if not isinstance(values, Mapping):
        name = where.rstrip(".") or cls.__name__
        raise SettingsError(f"{name}: expected a table of settings, got {values!r}.")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in set(values) - set(known))
    if unknown:
        raise SettingsError(
            f"{cls.__name__}: unknown setting {where}{unknown[0]!r}; it has: {', '.join(known)}."
        )
    return cls(
        **{
            key: _convert(hints[key], value, where + key, check_types)
            for key, value in values.items()
        }
    )


def _convert(kind: Any, value: Any, where: str, check_types: bool) -> Any:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # None, or a kind
        if value is None:
            return None
        (kind,) = (option for option in inner if option is not type(None))
        inner = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where + ".", check_types)  # type: ignore[arg-type]
    origin = typing.get_origin(kind)
    if not check_types:
        return _tuples(value) if origin is tuple else value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(inner[0], item, where, check_types) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or kind
    if expected is Any or (
        isinstance(value, expected) and not (expected is not bool and isinstance(value, bool))
    ):
        return value
    raise SettingsError(f"{where} must be of type {expected.__name__}, got {value!r}.")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def read_settings(cls: type[C], path: str | Path | None, overrides: Iterable[str] = ()) -> C:
    """Read a config file (`.toml` or `.json`) and apply `key=value` overrides.

    A dotted key reaches into a table (`data.takes=2`). Values are read as JSON and, where that
    fails, as plain text.
    """
    values = read_values(Path(path)) if path else {}
    for override in overrides or ():
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"an override is written key=value, got {override!r}.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *tables, name = key.split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
        target[name] = value
    return from_dict(cls, values)


def read_values(path: Path) -> dict[str, Any]:
    """What a config file (`.toml` or `.json`) holds.

    Raises:
        SettingsError: no such file, or not a table of settings.
    """
    if not path.is_file():
        raise SettingsError(f"there is no settings file at {path}.")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = read_text(path)
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: settings must be an object, got {values!r}.")
    return values


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain JSON values, readable again by `from_dict`."""
    return dataclasses.asdict(settings)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of a settings file and its overrides to a command-line parser."""
    parser.add_argument("--config", help="settings, .toml or .json")
    parser.add_argument("--output", help="run folder; an existing run is resumed")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, for example --set data.takes=2 (may be repeated)",
    )


def from_arguments(cls: type[C], arguments: Namespace) -> C:
    """The settings that the options of `add_arguments` describe."""
    overrides = list(arguments.overrides)
    if arguments.output:
        overrides.append(f"output={json.dumps(str(arguments.output))}")
    return read_settings(cls, arguments.config, overrides)
