"""What the benchmarks share: the pack on the path, where results go, and how a run is announced."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2dm.evaluation.protocol import ProtocolCard

ROOT = Path(__file__).resolve().parent.parent
# At the end: the pack's `nodes` must not hide a module of ComfyUI.
sys.path.append(str(ROOT))

RESULTS = ROOT / "docs" / "results"
RUNS = ROOT / "runs" / "benchmarks"

TAKE = 1000  # a take that no training run renders


def show(title: str, card: ProtocolCard) -> None:
    """Print what is about to be measured, and how."""
    print(title)
    for name, value in card.to_dict().items():
        print(f"  {name}: {value}")
    print(flush=True)
