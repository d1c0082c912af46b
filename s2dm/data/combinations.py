"""Splits by combination: whole combinations of a person and an action are held out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

C = TypeVar("C", bound=Hashable)


def hold_out(counts: Mapping[C, int], combinations: int, clips: int, seed: int) -> set[C]:
    """Draw combinations that hold exactly so many clips together.

    Every set of `combinations` of them with `clips` clips is as likely as any other: how many such
    sets there are is counted first, so nothing is drawn in vain however rare they are.

    Args:
        counts: clips of each combination; its order is part of the draw.
        combinations: how many to hold out.
        clips: how many clips they have together; 0 for any number.
        seed: another seed, another split. The same one gives the same split on every machine.

    Raises:
        ValueError: no such set exists.
    """
    names, sizes = list(counts), list(counts.values())
    if not 0 < combinations < len(names):
        raise ValueError(
            f"expected to hold out from 1 to {len(names) - 1} of {len(names)} combinations, got "
            f"{combinations}."
        )
    rng = np.random.default_rng((2403, seed))
    if clips == 0:
        return {names[place] for place in np.argsort(rng.random(len(names)))[:combinations]}
    # ways[i][k][n]: sets of k of the combinations from i on that have n clips, as floats: exact up
    # to 2^53, and beyond that the rounding is no draw's business.
    ways = np.zeros((len(names) + 1, combinations + 1, clips + 1))
    ways[-1, 0, 0] = 1
    for place in reversed(range(len(names))):
        ways[place] = ways[place + 1]
        if sizes[place] <= clips:
            ways[place, 1:, sizes[place] :] += ways[place + 1, :-1, : clips + 1 - sizes[place]]
    if not ways[0, combinations, clips]:
        raise ValueError(
            f"no {combinations} of {len(names)} combinations have {clips} clips together: a copy "
            "that lacks files needs other numbers. Set data.options.held_out_clips, 0 for any."
        )
    chosen = set()
    for place, name in enumerate(names):
        without = ways[place + 1, combinations, clips]
        if rng.random() * ways[place, combinations, clips] >= without:
            chosen.add(name)
            combinations, clips = combinations - 1, clips - sizes[place]
    return chosen
