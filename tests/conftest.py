"""What every test shares: the pack on the path, and one thread a process."""

import os
import sys
from pathlib import Path

# Several processes with several OpenMP threads each on few cores slow one another down badly.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# At the end of the path: the pack's `nodes` must not hide ComfyUI's module of the same name.
sys.path.append(str(Path(__file__).resolve().parent.parent))
