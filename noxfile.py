"""The project's commands. `pip install nox` and Python 3.10+ are all they need.

nox -s demo      make a video with a real ComfyUI, the bundled workflow and checkpoint
nox -s tests     all tests; `-- -k name` passes arguments on to pytest
nox -l           the others

ComfyUI is taken from COMFYUI_PATH if that is set, else fetched once into .nox.
"""

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui_install import locate  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

# Our own environment may pin what a user's must not.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
SHARED_ENVIRONMENT = ".nox/comfyui-environment"  # torch is large: once is enough


def install_comfyui(session: nox.Session, *extra: str) -> Path:
    """Install ComfyUI's requirements and `extra` into the session; the folder of ComfyUI."""
    comfyui = locate(Path(session.cache_dir).resolve(), session.install)
    session.install(*TORCH, "-r", str(comfyui / "requirements.txt"), "requests", *extra)
    return comfyui


@nox.session(venv_location=SHARED_ENVIRONMENT)
def demo(session: nox.Session) -> None:
    """Turn a prompt and the motion of a clip into a new video, in a real ComfyUI."""
    comfyui = install_comfyui(session, "-r", "requirements.txt")
    session.run("python", "install.py")
    session.run("python", "tools/demo.py", str(comfyui), *session.posargs)


def run_pytest(session: nox.Session, *selection: str) -> None:
    comfyui = install_comfyui(session, "-e", ".[training,test]")
    environment = {"COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
    session.run("pytest", *selection, *session.posargs, env=environment)


@nox.session(venv_location=SHARED_ENVIRONMENT)
def tests(session: nox.Session) -> None:
    """All tests but those of the interface: the library, the nodes, real servers."""
    run_pytest(session, "-m", "not frontend", "--durations=15")


@nox.session(venv_location=SHARED_ENVIRONMENT)
def tests_fast(session: nox.Session) -> None:
    """The tests that take seconds and start no server."""
    run_pytest(session, "-m", "not slow and not comfyui and not frontend")


@nox.session(venv_location=SHARED_ENVIRONMENT)
def frontend(session: nox.Session) -> None:
    """Open each bundled workflow in the real interface. Skipped where there is no Chromium."""
    session.install("playwright")
    run_pytest(session, "-m", "frontend")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's checks."""
    session.install("ruff>=0.6")
    session.run("ruff", "check", ".")


@nox.session(venv_location=SHARED_ENVIRONMENT, default=False)
def example_clip(session: nox.Session) -> None:
    """Render the example clip of the workflows again (a puppet the checkpoint never saw)."""
    install_comfyui(session, "-e", ".[standalone]")
    session.run("python", "tools/example_clip.py", *session.posargs)
