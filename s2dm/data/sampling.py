"""Which frames of a recording a clip is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..settings import SettingsError

Choose = Callable[[Sequence[float | None]], list[int]]
"""Numbers of the frames to take, in order, from the times of all of them."""

SAMPLINGS = ("even", "random")


def one_of_each_interval(frames: int, *draw: object) -> Choose:
    """The paper's sampling: as many equal intervals as frames, one random frame out of each.

    draw: whatever tells this draw from others, such as the clip's name and the number of the take.
    A recording with fewer frames than intervals repeats some.
    """

    def choose(times: Sequence[float | None]) -> list[int]:
        edges, lengths = _intervals(frames, len(times))
        return (edges + (_chance(draw).random(frames) * lengths).astype(int)).tolist()

    return choose


def some_of_each_interval(frames: int, choices: int, *draw: object) -> Choose:
    """What `one_of_each_interval` may be drawn from: its first frame, `choices` of each later one.

    An interval with fewer frames than `choices` repeats them as evenly as can be.
    """

    def choose(times: Sequence[float | None]) -> list[int]:
        edges, lengths = _intervals(frames, len(times))
        chance = _chance(draw)
        found = [int(edges[0] + chance.random(frames)[0] * lengths[0])]
        for edge, length in zip(edges[1:], lengths[1:], strict=True):
            found += sorted(edge + np.resize(chance.permutation(length), choices))
        return [int(number) for number in found]

    return choose


def _intervals(frames: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `frames` equal parts of `count` frames begins, and how many frames it has."""
    edges = np.arange(frames + 1) * count // frames
    return edges[:-1], np.maximum(edges[1:] - edges[:-1], 1)


def _chance(draw: tuple[object, ...]) -> np.random.Generator:
    key = hashlib.sha256(repr(draw).encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:8], "big"))


def check_sampling(sampling: str, takes: int, choices: int) -> None:
    """Refuse a sampling that doesn't exist, and draws of frames that aren't random.

    Raises:
        SettingsError: naming the option of a configuration.
    """
    if sampling not in SAMPLINGS:
        raise SettingsError(
            f"frame_sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}."
        )
    for name, count in (("takes", takes), ("frame_choices", choices)):
        if count < 1 or (count > 1 and sampling == "even"):
            raise SettingsError(
                f"{name} counts draws of frames: expected 1 with frame_sampling=even, got {count}. "
                "Set data.options.frame_sampling=random."
            )
