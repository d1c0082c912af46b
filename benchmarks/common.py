"""What the benchmarks share: the pack on the path, the checkpoint, and how results are written."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# At the end: the pack's `nodes` must not hide a module of ComfyUI.
sys.path.append(str(ROOT))

RESULTS = ROOT / "docs" / "results"
RUNS = ROOT / "runs" / "benchmarks"


def file_hash(path: Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256: which weights a figure belongs to."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:12]


def machine() -> dict[str, Any]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }


def show(title: str, protocol: dict[str, Any]) -> None:
    """Print what is about to be measured, and how."""
    print(title)
    for name, value in protocol.items():
        print(f"  {name}: {value}")
    print(flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


def command() -> str:
    """The command line of this run, for the results page."""
    import shlex

    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])
