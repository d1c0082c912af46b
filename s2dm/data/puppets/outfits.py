"""Clothes that nobody of the cast wears together: any top and trousers that captions can say."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .persons import PERSONS, TOP_COLOURS, TROUSER_COLOURS, Person

Outfit = tuple[str, str, str, str]
"""Colour and kind of the top, colour and kind of the trousers."""

_HELD_OUT = 0.1


def outfit(person: Person) -> Outfit:
    """What `person` wears."""
    return person.top_colour, person.top, person.trousers_colour, person.trousers


@functools.cache
def new_outfits(name: str) -> tuple[Outfit, ...]:
    """The outfits of a split that nobody of the cast wears; a tenth of them all is held out.

    Args:
        name: "train" or "test".

    Raises:
        ValueError: `name` is neither.
    """
    if name not in ("train", "test"):
        raise ValueError(f'Expected the split "train" or "test", got {name!r}.')
    worn = {outfit(person) for person in PERSONS}
    new = [
        clothes
        for top_colour in sorted(TOP_COLOURS)
        for top in sorted({person.top for person in PERSONS})
        for trousers_colour in sorted(TROUSER_COLOURS)
        for trousers in sorted({person.trousers for person in PERSONS})
        if (clothes := (top_colour, top, trousers_colour, trousers)) not in worn
    ]
    order = np.random.default_rng((2403, 24)).permutation(len(new))
    count = round(_HELD_OUT * len(new))
    chosen = order[:count] if name == "test" else order[count:]
    return tuple(new[index] for index in sorted(chosen.tolist()))


def dress(person: Person, clothes: Outfit, rng: np.random.Generator) -> Person:
    """The same person in other clothes, with a pattern that such a top has in the cast."""
    top_colour, top, trousers_colour, trousers = clothes
    patterns = sorted({other.pattern for other in PERSONS if other.top == top})
    return dataclasses.replace(
        person,
        top_colour=top_colour,
        top=top,
        pattern=patterns[rng.integers(len(patterns))],
        trousers_colour=trousers_colour,
        trousers=trousers,
    )
