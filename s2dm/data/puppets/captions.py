"""Captions in the grammar of the paper (Sec. 4.1): who, in which clothes, does what."""

from __future__ import annotations

from .actions import ACTIONS
from .persons import PERSONS, Person


def caption(person: int | Person, action: int) -> str:
    """The caption of a clip, for example
    "A man with glasses, wearing a black coat and blue jeans is squat".

    Args:
        person: index into `PERSONS`, or somebody else.
        action: index into `ACTIONS`.
    """
    who = person if isinstance(person, Person) else PERSONS[person]
    glasses = " with glasses" if who.glasses else ""
    article = "an" if who.top_colour[0] in "aeiou" else "a"
    return (
        f"A {who.gender}{glasses}, wearing {article} {who.top_colour} {who.top} "
        f"and {who.trousers_colour} {who.trousers} is {ACTIONS[action].name}"
    )
