"""Files that are either whole or not there, texts that people write, and what systems leave."""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LONGEST = 40  # characters of a name in its temporary one, which is longer than it
_MARKS = {  # UTF-32's first: it begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# What systems, network disks and archives put into folders without a dot before its name.
_OF_SYSTEMS = {
    "__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "found.000",
    "lost+found", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot",
    "network trash folder", "temporary items",
}  # fmt: skip


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

    Those that `is_left_by_systems` are left out.
    """

    def key(path: Path) -> list[str | int]:
        parts = re.split(r"([0-9]+)", path.name)  # text and numbers by turns
        return [int(part) if place % 2 else part for place, part in enumerate(parts)]

    return sorted((path for path in paths if not is_left_by_systems(path.name)), key=key)


def is_left_by_systems(name: str) -> bool:
    """Whether a file or folder is hidden, a bin, a store of previews or the like.

    What lies there are copies of what is elsewhere, or was thrown away.
    """
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def read_text(path: Path) -> str:
    """Read a text that a person wrote, with any editor: UTF-8, or what its byte-order mark says.

    Raises:
        ValueError: it is in another encoding, which can't be told from its bytes. OSError: it
            can't be read.
    """
    content = path.read_bytes()
    encoding = next((kind for mark, kind in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"the byte 0x{content[error.start]:02x} in line {line}"
        raise _no_utf8(path, found) from error
    if "\0" in text:  # of UTF-16 without its mark
        raise _no_utf8(path, "zero bytes")
    return text


def _no_utf8(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path}: expected text in UTF-8, got {found}. Save it as UTF-8: most editors offer that "
        "beside the name."
    )


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


def save_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    error: type[ValueError],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        error: it can't be written, most often because the disk is full. What was there stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata=metadata)
    except (OSError, SafetensorError) as reason:
        raise error(
            f"{path} could not be written ({reason}). Make room on the disk, or let others write "
            "to the folder; then run it again: it goes on from what was written before."
        ) from reason
