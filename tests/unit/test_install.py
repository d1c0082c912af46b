"""The script that ComfyUI-Manager runs after the requirements."""

from __future__ import annotations

import importlib.machinery
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
        lambda name: find_spec(name) if there or name != "cv2" else None,
    )
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert [command[-2] for command in commands] == ([] if there else ["opencv-python-headless"])


def left_behind(folder: Path, monkeypatch, kind: str) -> Path:
    """A cv2 that Python finds before the working one, in this process and in its children."""
    package = folder / "cv2"
    (package / "qt").mkdir(parents=True)
    if kind != "empty":
        lines = {"broken": "raise ImportError('DLL load failed while importing cv2')", "bare": ""}
        (package / "__init__.py").write_text(lines[kind])
    monkeypatch.setenv("PYTHONPATH", str(folder))
    # A package with a file would win over a folder without, wherever they stand.
    monkeypatch.setattr(
        sys, "path", [str(folder), *(p for p in sys.path if "site-packages" not in p)]
    )
    monkeypatch.delitem(sys.modules, "cv2", raising=False)  # that other tests have imported
    importlib.invalidate_caches()
    return package


@pytest.fixture
def registered(install, monkeypatch):
    """Set which packages are registered, with their versions."""

    def register(**versions: str) -> None:
        versions = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(install.importlib.metadata, "version", version)

    return register


@pytest.mark.parametrize("variant", [None, "opencv_contrib_python"])
def test_a_folder_that_was_left_behind_is_filled(
    install, registered, monkeypatch, tmp_path, variant
):
    left_behind(tmp_path, monkeypatch, "empty")
    # The working OpenCV of this environment stands in the way of what the user has.
    monkeypatch.setattr(install, "failure", lambda: "module 'cv2' has no attribute")
    pip = importlib.machinery.ModuleSpec("pip", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        install.importlib.util, "find_spec", lambda name: pip if name == "pip" else find_spec(name)
    )
    registered(numpy="2.1.0", **({variant: "4.10.0.84"} if variant else {}))
    expected = ["opencv-python-headless", "numpy==2.1.0"]
    if variant:
        expected = ["--force-reinstall", "--no-deps", "opencv-contrib-python==4.10.0.84"]
    assert install.command()[-len(expected) :] == expected


@pytest.mark.parametrize("kind", ["broken", "bare"])
def test_an_opencv_that_does_not_work_is_named_and_left_alone(
    install, registered, monkeypatch, tmp_path, kind
):
    left_behind(tmp_path, monkeypatch, kind)
    registered(opencv_python="4.10.0.84")
    reason = "DLL load failed" if kind == "broken" else "DISOpticalFlow_create"
    with pytest.raises(SystemExit, match=f"opencv-python.*{reason}.*left as it is: reinstall it"):
        install.command()
    registered(opencv_python="4.10.0.84", opencv_python_headless="4.11.0.86")
    with pytest.raises(SystemExit, match=r"opencv-python, opencv-python-headless.*uninstall all"):
        install.command()


def test_a_working_opencv_is_seen_as_such(install):
    pytest.importorskip("cv2")
    assert install.failure() is None and install.command() is None


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
