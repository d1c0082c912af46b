"""A real ComfyUI server with the pack in its custom_nodes, started once a test run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui_install import PACK, checked, prepare_base
from comfyui_server import ComfyServer
from random_checkpoint import write_random_checkpoint

RANDOM = "random.safetensors"


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI to test against, from COMFYUI_PATH."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set; `nox -s tests` sets it")
    return checked(Path(path))


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server on the CPU, with RANDOM among its checkpoints.

    Tests share it: it must survive whatever they send.
    """
    base = prepare_base(tmp_path_factory.mktemp("comfyui"))
    write_random_checkpoint(base / "models" / "s2dm" / RANDOM)
    with ComfyServer(comfyui, base, ["--cpu"]) as running:
        yield running


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """What the checkpoint loader calls the checkpoint to test with: the bundled one if there is
    one, else RANDOM."""
    bundled = sorted((PACK / "s2dm" / "assets").glob("*.safetensors"))
    return f"{bundled[0].name} (bundled)" if bundled else RANDOM
