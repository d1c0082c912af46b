"""The library in several processes that share the work, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_processes(count: int, *arguments: object) -> str:
    """Run a script or `-m module` in so many processes, on the CPU; what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    # A port of their own: tests run side by side.
    command += ["--standalone", "--nproc_per_node", str(count), *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
