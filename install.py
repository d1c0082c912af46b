"""Run by ComfyUI-Manager after the requirements: make sure that some OpenCV works.

OpenCV comes as four packages (with or without windows, with or without contrib) that write into
the same folder. Installing a second one damages the first and with it every other pack that uses
it, so this adds the smallest one only where `cv2` is missing altogether, and one that gets along
with the numpy that is there. What an installation has left without its library is filled again
with the package that it was of. Anything else that doesn't work is named and left alone.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "opencv-python-headless"
VARIANTS = (
    "opencv-python",
    "opencv-contrib-python",
    "opencv-python-headless",
    "opencv-contrib-python-headless",
)
# In a process of its own: a broken library may end it.
_CHECK = "import cv2; cv2.DISOpticalFlow_create"


def install_command() -> list[str]:
    """The command that installs PACKAGE into this interpreter, with pip or else uv."""
    return _command([], [PACKAGE, *_numpy_as_it_is()])


def reinstall_command(variant: str) -> list[str]:
    """The command that puts the files of an installed variant back, and touches nothing else."""
    version = importlib.metadata.version(variant)
    return _command(["--force-reinstall", "--no-deps"], [f"{variant}=={version}"])


def _command(options: list[str], packages: list[str]) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", *options, *packages]
    uv = shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--python", sys.executable, *options, *packages]
    raise SystemExit(f"S2DM needs OpenCV, and neither pip nor uv was found: install {PACKAGE}.")


def _numpy_as_it_is() -> list[str]:
    """A requirement that keeps the version of numpy: OpenCV's newest may want another."""
    try:
        return [f"numpy=={importlib.metadata.version('numpy')}"]
    except importlib.metadata.PackageNotFoundError:
        return []


def installed_variants() -> list[str]:
    """Those of the four packages that are registered, whether or not their files are there."""
    found = []
    for variant in VARIANTS:
        try:
            importlib.metadata.version(variant)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(variant)
    return found


def failure() -> str | None:
    """Why OpenCV doesn't work in this interpreter; None if it does."""
    done = subprocess.run(
        [sys.executable, "-c", _CHECK],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=Path(__file__).resolve().parent,
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended Python with code {done.returncode}"


def command() -> list[str] | None:
    """What to run, so that OpenCV works; None where it does.

    Raises:
        SystemExit: it doesn't work, and mending it could damage what others use.
    """
    spec = importlib.util.find_spec("cv2")
    if spec is None:
        return install_command()
    reason = failure()
    if reason is None:
        return None
    variants = installed_variants()
    # Python takes a folder that was left behind for a package; it has no file of its own.
    empty = spec.origin is None
    if empty and not variants:
        return install_command()
    if empty and len(variants) == 1:
        return reinstall_command(variants[0])
    remedy = (
        f"uninstall all of them, then install the one you want, such as {PACKAGE}"
        if len(variants) > 1
        else "reinstall it the way it was installed"
    )
    raise SystemExit(
        f"S2DM: OpenCV is installed ({', '.join(variants) or spec.origin}) and doesn't work: "
        f"{reason}. Other packs may use it, so it is left as it is: {remedy}, or install the "
        "library of the system that it misses (variants without 'headless' need libGL on Linux)."
    )


def main() -> None:
    run = command()
    if run is not None:
        print(f"S2DM: OpenCV is missing or empty, running {' '.join(run)}")
        subprocess.check_call(run)


if __name__ == "__main__":
    main()
