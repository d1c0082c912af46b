"""The script that ComfyUI-Manager runs after the requirements."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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


def test_without_pip_and_uv_it_says_what_to_do(install, monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="install opencv"):
        install.install_command()
