"""The script that ComfyUI-Manager runs after the requirements."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "install.py"


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # as a module it installs nothing
    return module


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_opencv_is_added_and_numpy_kept(install, monkeypatch, tool):
    if tool == "uv":
        monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(install.shutil, "which", lambda name: "/bin/uv")
    command = install.install_command()
    assert sys.executable in command
    kept = f"numpy=={importlib.metadata.version('numpy')}"
    assert command[-2:] == [install.PACKAGE, kept]
    assert (command[0] == "/bin/uv") == (tool == "uv")


@pytest.mark.parametrize("there", [True, False])
def test_it_installs_only_where_opencv_is_missing(monkeypatch, there):
    """A second OpenCV damages the first."""
    commands = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (object() if there else None) if name == "cv2" else find_spec(name),
    )
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert [command[-2] for command in commands] == ([] if there else ["opencv-python-headless"])


def test_the_requirements_leave_torch_numpy_and_opencv_alone():
    lines = (SCRIPT.parent / "requirements.txt").read_text("utf-8").splitlines()
    names = {re.match(r"[\w.-]*", line)[0].lower() for line in lines}
    assert "safetensors" in names
    assert not names & {"torch", "torchvision", "torchaudio", "numpy", "cv2"}
    assert not any(name.startswith("opencv") for name in names)


def test_without_pip_and_uv_it_says_what_to_do(install, monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="install opencv"):
        install.install_command()
