"""Videos of one's own: a folder of clips, with what each shows in a text file beside it."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from ..files import is_left_by_systems, read_text
from ..settings import SettingsError
from ..video import MOVING_SUFFIXES, VIDEO_SUFFIXES, cover, evenly, is_clip, read_frames
from .clip import Clip
from .flows import FILES, check_source, flow_file, flow_of, source_mark
from .sampling import Choose, check_sampling, one_of_each_interval, some_of_each_interval

_SPLITS = ("train", "test")
_HELD_OUT = 0.1
"""Share of the clips that is held out where the folder doesn't say which."""
_READING = "as a screen shows them, spread in time"
"""How clips are read; with another way of reading what was prepared by this one is stale."""


class VideoClips:
    """Clips of a folder: `wave.mp4`, or a folder `wave` of its frames, with `wave.txt` beside it.

    A clip is spread over `frames` frames from its first to its last, so it should show one action
    and not much else. Frames are scaled to cover the square and cropped at the centre; flow is
    estimated. Where the folder has subfolders `train` and `test`, these are the splits; otherwise
    about a tenth of the clips is held out, chosen by their names alone: a clip that is added moves
    no other one, but where there are so few that one had to be held out regardless. Clips are
    looked for in subfolders too, but not in hidden ones and those of the system, such as bins.
    Captions are UTF-8, or UTF-16 with a byte-order mark.

    Several clips of one person who does one thing belong together: a model that has seen one of
    them knows the others. `group` says which do, and then whole groups are held out.

    Args:
        folder: of the clips.
        name: "train" or "test".
        size: height and width in pixels.
        frames: frames of a clip.
        takes: how many draws of each clip, with `frame_sampling` "random".
        flow: "dis", "farneback", "raft_large", "raft_small", the path of a checkpoint with a
            region-motion model, or "files": beside each clip, as `wave.npz`, for all frames of it.
        frame_sampling, frame_choices: "even", or "random", see `RecordedClips`.
        group: a regular expression with one or more groups (in parentheses) that is looked for in a
            clip's path below the folder: clips in which they match the same text belong together.
            Or the names of columns of the table, with commas between them.
        table: a CSV file in the folder with the column `clip` (path below the folder), for columns
            that `group` names; and `caption`, in place of the text files.

    Raises:
        ValueError: no such folder, a split that is neither, no clip in it, a clip without caption,
            a caption in another encoding, a clip whose group isn't known, or another option that
            is wrong.
        OSError: a folder, caption or table can't be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str = "train",
        size: int = 128,
        frames: int = 16,
        takes: int = 1,
        flow: str = "dis",
        frame_sampling: str = "even",
        group: str = "",
        table: str = "",
        frame_choices: int = 1,
    ) -> None:
        if name not in _SPLITS:
            raise ValueError(f'Expected the split "train" or "test", got {name!r}.')
        check_source(flow)
        check_sampling(frame_sampling, takes, frame_choices)
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"There is no folder {folder} to take clips from: set data.options.folder to the "
                "one that holds them."
            )
        rows = _read_table(folder / table) if table else {}
        if all((folder / split).is_dir() for split in _SPLITS):
            if group:
                raise SettingsError(
                    f"{folder} has the folders train and test, which are the splits: leave out "
                    "group, or put the clips into one folder."
                )
            self.paths = find_clips(folder / name)
        else:
            found = find_clips(folder)
            held_out = _held_out(_groups(found, folder, group, rows))
            self.paths = [
                path for path, held in zip(found, held_out, strict=True) if held == (name == "test")
            ]
        if not self.paths:
            raise ValueError(
                f"No clip of the split {name!r} in {folder}: expected videos "
                f"({', '.join(VIDEO_SUFFIXES)}), animations ({', '.join(MOVING_SUFFIXES)}) or "
                "folders of images, two or more, each with a text file of the same name beside it."
            )
        texts = [rows.get(path.relative_to(folder).as_posix(), {}) for path in self.paths]
        if any("caption" in row for row in texts):
            self.captions = [
                " ".join(row.get("caption", "").split()) or _no_caption(path, folder / table)
                for path, row in zip(self.paths, texts, strict=True)
            ]
        else:
            self.captions = read_captions(self.paths)
        self._size, self._frames, self._takes = size, frames, takes
        self._flow, self._sampling, self.choices = flow, frame_sampling, frame_choices

    def __len__(self) -> int:
        return self._takes * len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Of the files and captions: another one when a clip was added, changed or named anew."""
        reading = _READING + source_mark(self._flow)
        found = files_fingerprint(self.paths, self.captions, reading)
        if self._flow != FILES:
            return found
        files = [flow_file(path) for path in self.paths]
        states = [(file.name, *_state(file)) for file in files if file.is_file()]
        return hashlib.sha256(f"{found} {states}".encode()).hexdigest()

    def __getitem__(self, index: int) -> Clip:
        """Read a clip and its flow.

        Raises:
            VideoError: the file can't be read. FlowError: its flow can't be estimated or read.
        """
        if self._sampling == "even":
            return self._clip(index, evenly(self._frames))
        return self._clip(index, one_of_each_interval(self._frames, *self._draw(index)))

    def pool(self, index: int) -> Clip:
        """See `RecordedClips.pool`."""
        if self.choices == 1:
            return self[index]
        choose = some_of_each_interval(self._frames, self.choices, *self._draw(index))
        return self._clip(index, choose)

    def _draw(self, index: int) -> tuple[object, ...]:
        take, number = divmod(index, len(self.paths))
        return self.paths[number].name, self.captions[number], take

    def _clip(self, index: int, choose: Choose) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(f"Clip {index} of {len(self)}.")
        number = index % len(self.paths)
        path, size = self.paths[number], (self._size, self._size)
        frames, numbers = read_frames(path, choose, lambda frame: cover(frame[None], *size)[0])
        return Clip(frames, flow_of(self._flow, frames, path, numbers), self.captions[number])


def find_clips(folder: Path) -> list[Path]:
    """Videos and folders of images anywhere below, in the order of names."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not is_left_by_systems(name)]
        found += [path for name in folders + files if is_clip(path := Path(parent, name))]
    return sorted(found)


def files_fingerprint(paths: Sequence[Path], captions: Sequence[str], reading: str) -> str:
    """Of clips in files, their captions, and how they are read."""
    digest = hashlib.sha256(reading.encode())
    for path, caption in zip(paths, captions, strict=True):
        digest.update(f"{path} {caption}\n".encode())
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update("{} {} {}\n".format(file.name, *_state(file)).encode())
    return digest.hexdigest()


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def _raise(error: OSError) -> None:
    raise error


def _held_out(groups: list[str]) -> list[bool]:
    """Which of the clips is held out: groups whose hash is low, at least one, never all."""
    hashes = [hashlib.sha256(group.encode()).digest() for group in groups]
    distinct = sorted(set(hashes))
    low = sum(int.from_bytes(digest, "big") < _HELD_OUT * 2**256 for digest in distinct)
    lowest = set(distinct[: max(1, min(low, len(distinct) - 1))])
    return [digest in lowest for digest in hashes]


def _groups(
    paths: list[Path], folder: Path, group: str, rows: dict[str, dict[str, str]]
) -> list[str]:
    """Of each clip, by what `group` says; without it, each is one by itself."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    if not group:
        return names
    columns = [column.strip() for column in group.split(",")]
    if rows and set(columns) <= {column for row in rows.values() for column in row}:
        if missing := [name for name in names if name not in rows]:
            raise SettingsError(
                f"{missing[0]} is not in the table, which has to say which group it belongs to: "
                "add a line."
            )
        return [repr([rows[name][column] for column in columns]) for name in names]
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise SettingsError(f"group: {group!r} is no regular expression ({error}).") from error
    if not pattern.groups:
        raise SettingsError(
            f"group: expected a regular expression with a group in parentheses, such as "
            f"(a\\d+_s\\d+), or columns of the table, got {group!r}."
        )
    found = [pattern.search(name) for name in names]
    for name, match in zip(names, found, strict=True):
        if match is None:
            raise SettingsError(
                f"{name} does not match {group!r}, which has to say which group each clip belongs "
                "to: rename the clip, or change data.options.group."
            )
    return [repr(match.groups()) for match in found if match is not None]


def _read_table(path: Path) -> dict[str, dict[str, str]]:
    """The lines of a CSV file by their column `clip`."""
    if not path.is_file():
        raise SettingsError(f"there is no table at {path}: expected a CSV file.")
    lines = list(csv.DictReader(io.StringIO(read_text(path))))
    if not lines or "clip" not in lines[0]:
        raise SettingsError(
            f"{path}: expected a CSV file whose first line names the columns, `clip` among them."
        )
    return {
        Path(line["clip"]).as_posix(): {k: v or "" for k, v in line.items() if k} for line in lines
    }


def _no_caption(path: Path, table: Path) -> NoReturn:
    raise ValueError(f"{path} has no caption: expected one in {table}.")


def read_captions(clips: Iterable[Path]) -> list[str]:
    """What the text file beside each clip says.

    Raises:
        ValueError: a clip has none, or in another encoding.
    """
    texts: dict[Path, dict[str, Path]] = {}  # by folder and stem
    captions = []
    for path in clips:
        if path.parent not in texts:
            files = (file for file in path.parent.iterdir() if file.suffix.lower() == ".txt")
            texts[path.parent] = {file.stem: file for file in files}
        name = path.name if path.is_dir() else path.stem  # a folder's name may hold a dot
        file = texts[path.parent].get(name, path.with_name(name + ".txt"))
        caption = " ".join(read_text(file).split()) if file.is_file() else ""
        if not caption:
            raise ValueError(
                f"{path} has no caption: expected {file} to say in a line what it shows."
            )
        captions.append(caption)
    return captions
