"""The project's commands. `pip install nox` and Python 3.10+ are all they need.

nox -s demo      make a video with a real ComfyUI, the bundled workflow and checkpoint
nox -s tests     all tests; what follows `--` goes to pytest, for example
                 nox -s tests -- -m "not slow and not comfyui" -n auto --dist loadfile
nox -s lint      ruff, its format, and mypy

ComfyUI is taken from COMFYUI_PATH if that is set, else fetched once into .nox.
"""

import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from comfyui_install import locate

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

# Our own environments may pin what a user's must not.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")


def install_comfyui(session: nox.Session, *extra: str) -> Path:
    """Install ComfyUI's requirements and `extra` into the session; the folder of ComfyUI."""
    comfyui = locate(Path(session.cache_dir).resolve(), session.install)
    session.install(*TORCH, "-r", str(comfyui / "requirements.txt"), "requests", *extra)
    return comfyui


@nox.session
def demo(session: nox.Session) -> None:
    """Turn a prompt and the motion of a clip into a new video, in a real ComfyUI."""
    # What a user's ComfyUI gets: the requirements, then the install script.
    comfyui = install_comfyui(session, "-r", "requirements.txt")
    session.run("python", "install.py")
    session.run("python", "tools/demo.py", str(comfyui), *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests: the library, the nodes in real servers and, with Chromium, the interface."""
    comfyui = install_comfyui(session, "-e", ".[training,test]")
    environment = {"COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
    # Side by side, those of a file one after the other: they share a server or what they trained.
    side_by_side = ("-n", "auto", "--maxprocesses=4", "--dist=loadfile", "--durations=15")
    session.run("pytest", *(session.posargs or side_by_side), env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's checks and format, and mypy where maths and formats are."""
    session.install("ruff>=0.6", "mypy>=1.13", *TORCH[:1], "numpy", "safetensors")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
