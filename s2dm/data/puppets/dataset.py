"""Splits and the data set of rendered clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from ...flow import pose_flow
from ..clip import Clip
from .actions import ACTIONS
from .outfits import dress, new_outfits
from .persons import PERSONS
from .render import render_clip
from .staging import USUAL, draw_staging

CONDITIONS = ("flow", "pose")
_HELD_OUT = 0.1


def split(name: str, seed: int = 0) -> list[tuple[int, int]]:
    """The combinations (person, action) of a split.

    A tenth of all combinations is held out, spread so that every person and every action occurs in
    both splits.

    Args:
        name: "train" or "test".
        seed: another seed, another split.

    Raises:
        ValueError: `name` is neither.
    """
    if name not in ("train", "test"):
        raise ValueError(f'Expected the split "train" or "test", got {name!r}.')
    held_out = _held_out(seed)
    return [
        (person, action)
        for person in range(len(PERSONS))
        for action in range(len(ACTIONS))
        if ((person, action) in held_out) == (name == "test")
    ]


def _held_out(seed: int) -> set[tuple[int, int]]:
    """Deal actions to persons in rounds, each round a shuffled pack of all actions."""
    rng = np.random.default_rng((2403, seed))
    persons, actions = rng.permutation(len(PERSONS)), []
    count = round(_HELD_OUT * len(PERSONS) * len(ACTIONS))
    while len(actions) < count:
        actions.extend(int(a) for a in rng.permutation(len(ACTIONS)))
    chosen: set[tuple[int, int]] = set()
    for k in range(count):
        # A combination dealt before (rare) passes on to the next person.
        for skip in range(len(PERSONS)):
            pair = int(persons[(k + skip) % len(PERSONS)]), actions[k]
            if pair not in chosen:
                chosen.add(pair)
                break
    return chosen


class PuppetClips(Dataset[Clip]):
    """Rendered clips: every combination of a split in `takes` takes.

    Args:
        name: "train" or "test".
        takes: how many takes of each combination.
        first_take: number of the first one; disjoint ranges give disjoint clips.
        size: height and width in pixels.
        frames: frames of a clip.
        seed: of the split.
        amplitudes: how much larger than usual the movements are, taking turns from take to take.
        elsewhere: share of the clips where the person stands at another place, at another size and
            before a camera that may move.
        recombined: share of the clips where the person wears clothes that nobody of the cast wears
            together, those of the split (`new_outfits`).
        condition: "flow", exact; or "pose": what the skeleton alone says of it (`pose_flow`).

    Raises:
        ValueError: a number is out of range, or another condition.
    """

    def __init__(
        self,
        name: str = "train",
        takes: int = 4,
        first_take: int = 0,
        size: int = 128,
        frames: int = 16,
        seed: int = 0,
        amplitudes: Sequence[float] = (1.0,),
        elsewhere: float = 0.0,
        recombined: float = 0.0,
        condition: str = "flow",
    ) -> None:
        if takes < 1:
            raise ValueError(f"Expected at least 1 take, got {takes}.")
        if not amplitudes or min(amplitudes) < 0:
            raise ValueError(f"Expected one or more amplitudes from 0 on, got {[*amplitudes]}.")
        if not (0 <= elsewhere <= 1 and 0 <= recombined <= 1):
            raise ValueError(
                f"Expected shares from 0 to 1, got elsewhere={elsewhere} and "
                f"recombined={recombined}."
            )
        if condition not in CONDITIONS:
            raise ValueError(
                f"Expected one of {', '.join(CONDITIONS)} as condition, got {condition!r}."
            )
        self._condition = condition
        self._pairs = split(name, seed)
        self._outfits = new_outfits(name)
        self._elsewhere, self._recombined = elsewhere, recombined
        self._takes, self._first_take = takes, first_take
        self._size, self._frames = size, frames
        self._amplitudes = tuple(amplitudes)

    def __len__(self) -> int:
        return len(self._pairs) * self._takes

    def labels(self, index: int) -> dict[str, str]:
        """Whose clip it is and of what, for figures by class and by subject."""
        person, action = self._pairs[index % len(self._pairs)]
        return {"class": ACTIONS[action].name, "subject": str(person)}

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(f"Clip {index} of {len(self)}.")
        take, pair = divmod(index, len(self._pairs))
        person, action = self._pairs[pair]
        amplitude = self._amplitudes[take % len(self._amplitudes)]
        take += self._first_take
        # Of its own generator, so that room, light and movement are those of the usual clip.
        rng = np.random.default_rng((2403, 16, person, action, take))
        draw = rng.random(2)
        staging = draw_staging(rng) if draw[0] < self._elsewhere else USUAL
        who = PERSONS[person]
        if draw[1] < self._recombined:
            who = dress(who, self._outfits[rng.integers(len(self._outfits))], rng)
        clip = render_clip(person, action, take, self._size, self._frames, amplitude, who, staging)
        if self._condition == "pose":
            return dataclasses.replace(clip, flow=pose_flow(clip.pose, self._size, self._size))
        return clip
