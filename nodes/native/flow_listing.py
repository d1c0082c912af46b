"""Which flow files ComfyUI's folders for input and output hold."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import folder_paths

logger = logging.getLogger(__name__)

_OUTPUT = " [output]"
_DEPTH = 3  # folders below input and output that are looked into
_MOST = 5000  # folders and files that are looked at


def list_flows() -> list[str]:
    """Files and folders of flow, as Load Flow offers them; those of the output folder say so.

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
                logger.warning("S2DM: %s could not be searched for flow: %s", folder, error)
                continue
            left -= len(entries)
            if depth and _holds_frames(entries):
                found.append(folder.relative_to(root).as_posix() + mark)
                continue
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.lower().endswith((".npz", ".flo")):
                    found.append(Path(entry.path).relative_to(root).as_posix() + mark)
                elif depth < _DEPTH and entry.is_dir():
                    folders.append((Path(entry.path), depth + 1))
    return sorted(found)


def find_flow(name: str) -> Path:
    """The path of an entry of `list_flows`.

    Raises:
        ValueError: there is no such file any more, or it lies elsewhere.
    """
    root, mark = _roots()[1 if name.endswith(_OUTPUT) else 0]
    path = (root / name.removesuffix(mark)).resolve() if mark else (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.exists():
        raise ValueError(
            f"expected a flow in the folder {root}, got {name!r}. Put it there and reload the page."
        )
    return path


def _roots() -> list[tuple[Path, str]]:
    return [
        (Path(folder_paths.get_input_directory()), ""),
        (Path(folder_paths.get_output_directory()), _OUTPUT),
    ]


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
