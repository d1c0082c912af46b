"""Protocol cards: what has to stand beside a figure for anyone to compare it or make it again."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


def code_version() -> str:
    """Version of the package and, where it runs from its repository, the commit.

    "+" behind the commit: files that git tracks have been changed since.
    """
    try:
        version = metadata.version("s2dm-video")
    except metadata.PackageNotFoundError:
        version = "not installed"
    if not (_ROOT / ".git").exists():
        return version
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return version
    changed = "+" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{version}, commit {commit}{changed}"


def _git(*arguments: str) -> str:
    """What git prints, or nothing where it is missing or refuses the repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def hardware(device: Any = "cpu") -> dict[str, Any]:
    """The machine and the versions that decide speed and the last digits of a result.

    Args:
        device: where it was computed, a torch.device or its name.
    """
    import torch

    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def command_line() -> str:
    """The command of this process, a script of the repository named from its root."""
    program = Path(sys.argv[0]).resolve()
    if program.stem == "s2dm" or program == _ROOT / "s2dm" / "cli" / "__main__.py":
        return shlex.join(["s2dm", *sys.argv[1:]])
    if program.is_relative_to(_ROOT):
        return shlex.join(["python", program.relative_to(_ROOT).as_posix(), *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def file_hash(path: str | Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256: which weights a figure belongs to."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class ProtocolCard:
    """How a figure was made. What does not apply to it is None and left out.

    Attributes:
        checkpoint: name and hash of the weights that were evaluated.
        features: the network of FVD and KVD, with the hash of its weights and its preprocessing.
        clips: N, the number of clips.
        data: which clips.
        frames: of a clip.
        size: (height, width) in pixels.
        value_range: of the pixels that were measured.
        seeds: of the noise.
        notes: anything else, above all what each metric means, by name.
        command: repeats the run.
        code: version of this project.
        hardware: machine and versions.
    """

    checkpoint: str | None = None
    features: str | None = None
    clips: int | None = None
    data: str | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    value_range: tuple[float, float] | None = None
    seeds: Sequence[int] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    command: str = field(default_factory=command_line)
    code: str = field(default_factory=code_version)
    hardware: Mapping[str, Any] = field(default_factory=hardware)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the command first, notes between data and machine, None left out."""
        values = dataclasses.asdict(self)
        notes = values.pop("notes")
        last = {name: values.pop(name) for name in ("code", "hardware")}
        ordered = {"command": values.pop("command"), **values, **notes, **last}
        return {name: _plain(value) for name, value in ordered.items() if value is not None}

    def to_markdown(self) -> str:
        return protocol_markdown(self.to_dict())


def protocol_markdown(protocol: Mapping[str, Any]) -> str:
    """A card as read back from JSON: the command as a code block, the rest folded below it."""
    lines = ["```", protocol["command"], "```", "", "<details><summary>Protocol</summary>", ""]
    lines += [
        f"- {name.replace('_', ' ')}: {_text(name, value)}"
        for name, value in protocol.items()
        if name != "command"
    ]
    return "\n".join([*lines, "", "</details>"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, (tuple, range)) else value


def _text(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list):
        between = {"size": "x", "value_range": " to "}.get(name, ", ")
        return between.join(f"{entry:g}" for entry in value)
    return str(value)
