"""Recordings of persons who do something, as published data sets have them: MHAD and MUG.

A data set says which files there are and who does what in them (`mhad.py`, `mug.py`); captions,
the split by combination, the choice of frames and the flow are the same for all and stand here.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import read_text
from ..settings import SettingsError
from ..video import evenly, read_frames
from .clip import Clip
from .combinations import hold_out
from .flows import FILES, check_source, flow_of, source_mark
from .sampling import Choose, check_sampling, one_of_each_interval, some_of_each_interval
from .videos import files_fingerprint

logger = logging.getLogger(__name__)

Combination = tuple[str, str]

TABLES = Path(__file__).parent / "tables"
"""The tables that the package comes with, `mhad.toml` and `mug.toml`: copy one to edit it."""


@dataclass(frozen=True)
class Recording:
    """A video file or a folder of pictures, and who does what in it, by the data set's names."""

    path: Path
    person: str
    action: str

    @property
    def combination(self) -> Combination:
        return self.person, self.action


@dataclass(frozen=True)
class Protocol:
    """The numbers of the paper for a data set (arXiv 2403.13408, section 4.1)."""

    recordings: int
    combinations: int
    held_out_combinations: int
    held_out_clips: int


@dataclass(frozen=True)
class Words:
    """What captions say: `caption` with the words for `{person}` and `{action}`."""

    caption: str
    persons: dict[str, str]
    actions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Words:
        """Read a table as `s2dm/data/tables` has them.

        Raises:
            SettingsError: no such file, or something else in it.
        """
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        if not path.is_file():
            raise SettingsError(
                f"there is no table of persons and actions at {path}. Copy one of {TABLES}."
            )
        try:
            values = tomllib.loads(read_text(path))
            words = cls(values["caption"], dict(values["persons"]), dict(values["actions"]))
            words.of(next(iter(words.persons)), next(iter(words.actions)))
        except (tomllib.TOMLDecodeError, KeyError, TypeError, StopIteration) as error:
            raise SettingsError(
                f"{path}: expected caption, [persons] and [actions] as in the tables of {TABLES}, "
                f"got something else ({type(error).__name__}: {error})."
            ) from error
        return words

    def of(self, person: str, action: str) -> str:
        who = self.persons[person]
        text = self.caption.format(person=who, action=self.actions[action])
        return " ".join(text.split())


class RecordedClips:
    """The recordings of a split as clips.

    Clip i is take i // R of recording i % R, for R recordings. Frames are chosen by `sampling`:
    "even", the same in every take, from the first to the last; or "random", as the paper does in
    training: as many equal intervals as frames, and out of each a random frame. Each take is
    another draw. Flow is measured from the first frame of a draw, so a take has one, while its
    later frames may be drawn anew each time out of its `pool`.

    Args:
        recordings: all of the data set, in an order that does not depend on the disk.
        words: of the captions.
        protocol: what is held out.
        name: "train" or "test".
        size, frames: of the clips.
        takes: how many clips a recording gives.
        seed: of the split, and of the frames that are drawn.
        sampling: "even" or "random".
        choices: with "random", how many frames of each later interval a pool has.
        flow: "dis", "farneback", "raft_large", "raft_small", or the path of a checkpoint with a
            region-motion model.
        window: (left, top, right, bottom) of what is taken of a frame, as parts of it.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        words: Words,
        protocol: Protocol,
        name: str,
        size: int = 128,
        frames: int = 16,
        takes: int = 1,
        seed: int = 0,
        sampling: str = "even",
        choices: int = 1,
        flow: str = "dis",
        window: tuple[float, float, float, float] = (0, 0, 1, 1),
    ) -> None:
        if name not in ("train", "test"):
            raise SettingsError(f'expected the split "train" or "test", got {name!r}.')
        check_sampling(sampling, takes, choices)
        check_source(flow)
        if flow == FILES:
            raise SettingsError("flow must be estimated here: files are for the data set videos.")
        _check_words(recordings, words)
        self.held_out = split(recordings, protocol, seed)
        self.recordings = [
            one for one in recordings if (one.combination in self.held_out) == (name == "test")
        ]
        self._words, self._seed = words, seed
        self._sampling, self._flow, self._window = sampling, flow, window
        self._size, self._frames, self._takes = size, frames, takes
        self.choices = choices

    def __len__(self) -> int:
        return self._takes * len(self.recordings)

    def labels(self, index: int) -> dict[str, str]:
        """Whose clip it is and of what, for figures by class and by subject."""
        recording = self.recordings[index % len(self.recordings)]
        return {"class": recording.action, "subject": recording.person}

    def caption(self, index: int) -> str:
        return self._words.of(*self.recordings[index % len(self.recordings)].combination)

    @cached_property
    def fingerprint(self) -> str:
        """Of the files and captions: another one when any was changed."""
        paths = [recording.path for recording in self.recordings]
        captions = [self.caption(index) for index in range(len(paths))]
        reading = f"recordings {self._window}{source_mark(self._flow)}"
        return files_fingerprint(paths, captions, reading)

    def __getitem__(self, index: int) -> Clip:
        """Read a clip and estimate its flow.

        Raises:
            VideoError: the file can't be read. FlowError: the flow can't be estimated.
        """
        if self._sampling == "even":
            return self._clip(index, evenly(self._frames))
        return self._clip(index, one_of_each_interval(self._frames, *self._draw(index)))

    def pool(self, index: int) -> Clip:
        """The clip with `choices` frames of each later interval: 1 + (frames - 1) * choices.

        Raises:
            VideoError, FlowError: as for the clip.
        """
        if self.choices == 1:
            return self[index]
        choose = some_of_each_interval(self._frames, self.choices, *self._draw(index))
        return self._clip(index, choose)

    def _draw(self, index: int) -> tuple[object, ...]:
        take, number = divmod(index, len(self.recordings))
        recording = self.recordings[number]
        return *recording.combination, recording.path.name, take, self._seed

    def _clip(self, index: int, choose: Choose) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(f"Clip {index} of {len(self)}.")
        recording = self.recordings[index % len(self.recordings)]
        fit = partial(framed, size=self._size, window=self._window)
        frames, numbers = read_frames(recording.path, choose, fit)
        flow = flow_of(self._flow, frames, recording.path, numbers)
        return Clip(frames, flow, self.caption(index))


def split(recordings: Iterable[Recording], protocol: Protocol, seed: int) -> set[Combination]:
    """The combinations that are held out.

    Logs where the data set is not as large as the paper's.
    """
    counts = Counter(recording.combination for recording in recordings)
    found = sum(counts.values())
    if (found, len(counts)) != (protocol.recordings, protocol.combinations):
        logger.warning(
            "The paper's data set has %d clips of %d combinations of person and action; here are "
            "%d of %d, so figures are not of the same clips.",
            protocol.recordings, protocol.combinations, found, len(counts),
        )  # fmt: skip
    ordered = dict(sorted(counts.items(), key=lambda entry: entry[0]))
    return hold_out(ordered, protocol.held_out_combinations, protocol.held_out_clips, seed)


def framed(
    frame: Tensor, size: int, window: tuple[float, float, float, float] = (0, 0, 1, 1)
) -> Tensor:
    """A part of a frame (3,H,W), whole in a square: its longer side fills it, the rest is black."""
    height, width = frame.shape[1:]
    left, top, right, bottom = (
        round(part * side) for part, side in zip(window, (width, height) * 2, strict=True)
    )
    frame = frame[:, top:bottom, left:right]
    height, width = frame.shape[1:]
    scale = size / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(frame[None], (tall, wide), mode="bilinear", antialias=True)[0]
    square = torch.zeros(3, size, size)
    top, left = (size - tall) // 2, (size - wide) // 2
    square[:, top : top + tall, left : left + wide] = small.clamp(0, 1)
    return square


def _check_words(recordings: Iterable[Recording], words: Words) -> None:
    for recording in recordings:
        for kind, name, known in (
            ("persons", recording.person, words.persons),
            ("actions", recording.action, words.actions),
        ):
            if name not in known:
                raise SettingsError(
                    f"{recording.path}: the table has no word for {name!r} in [{kind}]; it has: "
                    f"{', '.join(known)}. Add it to a copy of the table, and give that as "
                    "data.options.table."
                )
