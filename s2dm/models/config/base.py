"""What all configs share: their dictionary form, and checks of names and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...settings import SettingsError, from_dict

# Far above any real model. A damaged file may claim any number, and what follows from it must
# neither overflow nor take long to list; the weights' shapes are compared after that.
MOST = 2**16
MOST_LEVELS = 8
MOST_BLOCKS = 16
MOST_LAYERS = 512
MOST_TOKENS = 2**20
MOST_PIXELS = 2**14  # along a side
MOST_STEPS = 10**5
MOST_COUNT = 10**12
HUGE = 1e30

_C = TypeVar("_C", bound="Config")


@dataclass(frozen=True)
class Config:
    """Dictionary form and checks that all configs share."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-ready dictionaries, lists and numbers."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """Build a config from `to_dict` output. Missing entries take their defaults.

        Raises:
            SettingsError: if an entry is unknown, has the wrong type or a value out of range.
        """
        try:
            return from_dict(cls, values, check_types=False)
        except TypeError as error:
            raise SettingsError(f"{cls.__name__}: {error}.") from error

    def _expect(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            got = getattr(self, name)
            raise SettingsError(f"{type(self).__name__}.{name}: expected {expected}, got {got!r}.")

    def _expect_positive(self, *names: str, most: int = MOST) -> None:
        for name in names:
            good = is_count(getattr(self, name), most)
            self._expect(good, name, f"a whole number from 1 to {most}")

    def _expect_multipliers(self, name: str, most: int = MOST) -> None:
        value = getattr(self, name)
        good = (
            isinstance(value, tuple)
            and 1 <= len(value) <= MOST_LEVELS
            and all(is_count(item, most) for item in value)
        )
        expected = f"a list of 1 to {MOST_LEVELS} whole numbers from 1 to {most}"
        self._expect(good, name, expected)

    def _expect_widths(self) -> None:
        """Multipliers of the levels, and what follows from them."""
        self._expect_multipliers("channel_mult")
        good = max(getattr(self, "widths")) <= MOST  # noqa: B009 (of those that have levels)
        self._expect(good, "channel_mult", f"levels of at most {MOST} channels")

    def _expect_size(self, name: str, factor: int) -> None:
        self._expect_multipliers(name, MOST_PIXELS)
        size = getattr(self, name)
        good = len(size) == 2 and not any(side % factor for side in size)
        self._expect(good, name, f"height and width, multiples of {factor}")

    def _expect_levels(self) -> None:
        self._expect_widths()
        # ldm and diffusers agree on the width of the first convolution only then.
        first, *_ = getattr(self, "channel_mult")  # noqa: B009
        self._expect(first == 1, "channel_mult", "a list that starts with 1")


def is_count(value: Any, most: int = MOST, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -HUGE < value < HUGE


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
