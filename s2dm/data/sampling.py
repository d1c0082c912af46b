"""Which frames of a recording a clip is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

Choose = Callable[[Sequence[float | None]], list[int]]
"""Numbers of the frames to take, in order, from the times of all of them."""

SAMPLINGS = ("even", "random")


def one_of_each_interval(frames: int, *draw: object) -> Choose:
    """The paper's sampling: as many equal intervals as frames, one random frame out of each.

    draw: whatever tells this draw from others, such as the clip's name and the number of the take.
    A recording with fewer frames than intervals repeats some.
    """

    def choose(times: Sequence[float | None]) -> list[int]:
        key = hashlib.sha256(repr(draw).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(key[:8], "big"))
        edges = np.arange(frames + 1) * len(times) // frames
        lengths = np.maximum(edges[1:] - edges[:-1], 1)
        return (edges[:-1] + (rng.random(frames) * lengths).astype(int)).tolist()

    return choose
