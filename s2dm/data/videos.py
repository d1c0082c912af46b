"""Videos of one's own: a folder of clips, with what each shows in a text file beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from ..files import is_left_by_systems, read_text
from ..flow import estimate_flow
from ..video import MOVING_SUFFIXES, VIDEO_SUFFIXES, is_clip, read_clip
from .clip import Clip

_SPLITS = ("train", "test")
_HELD_OUT = 0.1
"""Share of the clips that is held out where the folder doesn't say which."""
_READING = b"as a screen shows them, spread in time"
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

    Args:
        folder: of the clips.
        name: "train" or "test".
        size: height and width in pixels.
        frames: frames of a clip.

    Raises:
        ValueError: no such folder, a split that is neither, no clip in it, a clip without caption,
            or a caption in another encoding.
        OSError: a folder or caption can't be read.
    """

    def __init__(
        self, folder: str | os.PathLike[str], name: str = "train", size: int = 128, frames: int = 16
    ) -> None:
        if name not in _SPLITS:
            raise ValueError(f'Expected the split "train" or "test", got {name!r}.')
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"There is no folder {folder} to take clips from: set data.options.folder to the "
                "one that holds them."
            )
        if all((folder / split).is_dir() for split in _SPLITS):
            self.paths = find_clips(folder / name)
        else:
            found = find_clips(folder)
            held_out = _held_out([path.relative_to(folder).as_posix() for path in found])
            self.paths = [
                path for path, held in zip(found, held_out, strict=True) if held == (name == "test")
            ]
        if not self.paths:
            raise ValueError(
                f"No clip of the split {name!r} in {folder}: expected videos "
                f"({', '.join(VIDEO_SUFFIXES)}), animations ({', '.join(MOVING_SUFFIXES)}) or "
                "folders of images, two or more, each with a text file of the same name beside it."
            )
        self.captions = read_captions(self.paths)
        self._size, self._frames = size, frames

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Of the files and captions: another one when a clip was added, changed or named anew."""
        digest = hashlib.sha256(_READING)
        for path, caption in zip(self.paths, self.captions, strict=True):
            digest.update(f"{path} {caption}\n".encode())
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                state = file.stat()
                digest.update(f"{file.name} {state.st_mtime_ns} {state.st_size}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Clip:
        """Read a clip and estimate its flow.

        Raises:
            VideoError: the file can't be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Clip {index} of {len(self)}.")
        frames, _ = read_clip(self.paths[index], self._frames, (self._size, self._size))
        return Clip(frames, estimate_flow(frames), self.captions[index])


def find_clips(folder: Path) -> list[Path]:
    """Videos and folders of images anywhere below, in the order of names."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not is_left_by_systems(name)]
        found += [path for name in folders + files if is_clip(path := Path(parent, name))]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _held_out(names: list[str]) -> list[bool]:
    """Which of the clips is held out: those whose hash is low, at least one, never all."""
    hashes = [hashlib.sha256(name.encode()).digest() for name in names]
    low = sum(int.from_bytes(digest, "big") < _HELD_OUT * 2**256 for digest in hashes)
    lowest = set(sorted(hashes)[: max(1, min(low, len(names) - 1))])
    return [digest in lowest for digest in hashes]


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
