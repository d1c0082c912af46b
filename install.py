"""Run by ComfyUI-Manager after the requirements: make sure that some OpenCV is present.

OpenCV comes as four packages (with or without windows, with or without contrib) that write into
the same folder. Installing a second one damages the first and with it every other pack that uses
it, so this adds the smallest one only where `cv2` is missing altogether, and one that gets along
with the numpy that is there.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys

PACKAGE = "opencv-python-headless"


def install_command() -> list[str]:
    """The command that installs PACKAGE into this interpreter, with pip or else uv."""
    packages = [PACKAGE, *_numpy_as_it_is()]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", *packages]
    uv = shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--python", sys.executable, *packages]
    raise SystemExit(f"S2DM needs OpenCV, and neither pip nor uv was found: install {PACKAGE}.")


def _numpy_as_it_is() -> list[str]:
    """A requirement that keeps the version of numpy: OpenCV's newest may want another."""
    try:
        return [f"numpy=={importlib.metadata.version('numpy')}"]
    except importlib.metadata.PackageNotFoundError:
        return []


if __name__ == "__main__" and importlib.util.find_spec("cv2") is None:
    subprocess.check_call(install_command())
