"""Which files of flow and of keypoints ComfyUI's folders for input and output hold."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...s2dm.flow.openpose import SUFFIX

logger = logging.getLogger(__name__)

_OUTPUT = " [output]"
_DEPTH = 3  # folders below input and output that are looked into
_MOST = 5000  # folders and files that are looked at


def list_flows() -> list[str]:
    """Files and folders of flow, as Load Flow offers them; those of the output folder say so."""
    return _listed((".npz", ".flo"), _holds_frames)


def list_poses() -> list[str]:
    """Files of JSON, and folders of files that OpenPose wrote, in the same way."""
    return _listed((".json",), _holds_poses)


def _listed(
    suffixes: tuple[str, ...], holds: Callable[[list[os.DirEntry[str]]], bool]
) -> list[str]:
    """Files that end so, and folders that `holds` knows as one thing.

    A folder that can't be read hides what it holds: an error here would cost the pack its nodes.
    """
    found = []
    for root, mark in _roots():
        left = _MOST
        folders = [(root, 0)]
        while folders and left > 0:
            folder, depth = folders.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)[:left]
            except OSError as error:
                logger.warning("S2DM: %s could not be searched: %s", folder, error)
                continue
            left -= len(entries)
            if depth and holds(entries):
                found.append(folder.relative_to(root).as_posix() + mark)
                continue
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.lower().endswith(suffixes):
                    found.append(Path(entry.path).relative_to(root).as_posix() + mark)
                elif depth < _DEPTH and entry.is_dir():
                    folders.append((Path(entry.path), depth + 1))
    return sorted(found)


def find_flow(name: str, what: str) -> Path:
    """The path of an entry of `list_flows` or `list_poses`.

    what: it should be, for the message.

    Raises:
        ValueError: there is no such file any more, or it lies elsewhere.
    """
    root, mark = _roots()[1 if name.endswith(_OUTPUT) else 0]
    path = (root / name.removesuffix(mark)).resolve() if mark else (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.exists():
        raise ValueError(
            f"expected {what} in the folder {root}, got {name!r}. Put it there and reload the page."
        )
    return path


def mark_of(name: str) -> str:
    """Another text when the entry, or a file in it, has changed; "missing" for none."""
    try:
        path = find_flow(name, "")
    except ValueError:
        return "missing"
    inside = sorted(os.scandir(path), key=lambda entry: entry.name) if path.is_dir() else []
    marks = [path.stat(), *(entry.stat() for entry in inside)]
    return str([(mark.st_mtime_ns, mark.st_size) for mark in marks])


def _roots() -> list[tuple[Path, str]]:
    return [
        (Path(folder_paths.get_input_directory()), ""),
        (Path(folder_paths.get_output_directory()), _OUTPUT),
    ]


def _holds_poses(entries: list[os.DirEntry[str]]) -> bool:
    return any(entry.name.endswith(SUFFIX) for entry in entries)


def _holds_frames(entries: list[os.DirEntry[str]]) -> bool:
    """Whether a folder is a clip of flow: .flo or .exr files, or PNGs as KITTI has them."""
    names = [entry.name.lower() for entry in entries]
    if any(name.endswith((".flo", ".exr")) for name in names):
        return True
    first = next((entry for entry in entries if entry.name.lower().endswith(".png")), None)
    if first is None:
        return False
    try:
        with open(first.path, "rb") as file:
            header = file.read(26)
    except OSError:
        return False
    # In a PNG's header: 16 bits a channel, three of them.
    return header[:4] == b"\x89PNG" and header[24:26] == b"\x10\x02"
