"""Files that are either whole or not there, and the order of numbered ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LONGEST = 40  # characters of a name in its temporary one, which is longer than it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` (same ending); rename it to `path` if all went well.

    The folder of `path` is created. What the file holds is on the disk when it gets its name, so
    that a lost machine leaves no empty file under `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem[:_LONGEST]}-", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the user may read; a result is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: what it held before is dropped when the new one is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:_LONGEST]}-", dir=folder.parent))
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Files in the order of their names, numbers by their value: 2 before 10.

    Hidden ones are left out, such as macOS puts beside a file on a foreign disk.
    """

    def key(path: Path) -> list[str | int]:
        parts = re.split(r"([0-9]+)", path.name)  # text and numbers by turns
        return [int(part) if place % 2 else part for place, part in enumerate(parts)]

    return sorted((path for path in paths if not path.name.startswith(".")), key=key)


def read_json_lines(path: Path) -> list[Any]:
    """What the lines of a file hold, without those that were cut short by a lost machine."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
