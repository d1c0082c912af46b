"""A real ComfyUI server with the pack in its custom_nodes, started once a test run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui_install import checked, prepare_base
from comfyui_server import ComfyServer


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI to test against, from COMFYUI_PATH."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set; `nox -s tests` sets it")
    return checked(Path(path))


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server on the CPU. Tests share it: it must survive whatever they send."""
    base = prepare_base(tmp_path_factory.mktemp("comfyui"))
    with ComfyServer(comfyui, base, ["--cpu"]) as running:
        yield running
