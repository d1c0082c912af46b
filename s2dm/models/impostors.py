"""What a file really is that has the name of a checkpoint, told from its first bytes.

Downloads go wrong in a few ways again and again, and none of them is told by an error about
headers or opcodes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

_START = 1024  # bytes that are looked at
_AGAIN = "Download it again."

# Beginnings that are told apart without regard to case and to white space before them.
_TEXTS = {
    "version https://git-lfs": (
        "a git-lfs pointer, which stands for a file that was not downloaded. Run `git lfs pull` "
        "in its folder, or download the file itself."
    ),
    "<!doctype html": (
        "a web page: the address leads to the page of the file, or to one that asks to log in. "
        "Download the file itself."
    ),
    "<html": "a web page. Download the file itself.",
    "<?xml": "an XML document, such as a server sends in place of a file. " + _AGAIN,
    "<": "a document in place of the file. " + _AGAIN,
    "{": "a JSON text, such as a server sends in place of a file. " + _AGAIN,
}
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def impostor(path: Path) -> str | None:
    """Say what the file is, and what to do, if it is none that holds weights.

    Returns:
        The end of a sentence that begins with "got", or None for a file that may hold weights: a
        safetensors file, a pickle, or something that isn't known.

    Raises:
        OSError: if it can't be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_START)
    if not start:
        return "an empty file. " + _AGAIN
    if start.count(0) == len(start):
        return "nothing but zeros, as an interrupted download leaves. " + _AGAIN
    if start[:4] == b"GGUF":
        return "a GGUF file, whose weights are quantised. Use the original."
    for magic, name in _ARCHIVES.items():
        if start.startswith(magic):
            return f"a {name} archive. Unpack it, and use what is inside."
    if start[:2] == b"PK" and not _has_directory(path):
        return f"the first {size} bytes of a longer file: it is truncated. " + _AGAIN
    text = start.removeprefix(b"\xef\xbb\xbf").decode("latin-1").lstrip().lower()
    # A safetensors file has its brace after eight bytes of length.
    for beginning, meaning in _TEXTS.items():
        if text.startswith(beginning):
            return meaning
    if size < _START and start.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        return "a short text. " + _AGAIN
    return None


def _has_directory(path: Path) -> bool:
    """Whether a zip archive has its table of contents, which stands at its end."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def is_pickle(start: bytes) -> bool:
    """Whether a file begins like one of torch.save: a zip archive, or a pickle from protocol 2."""
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
