"""What a real server knows of the pack once it has started."""

import shutil
from pathlib import Path

import pytest
from comfyui_install import PACK, PACK_NAME
from comfyui_server import ComfyServer

pytestmark = pytest.mark.comfyui

CLIP = PACK / "workflows" / "s2dm_example.mp4"


def test_every_node_with_a_help_page_is_there(server: ComfyServer) -> None:
    """One schema that fails drops the rest of the pack, with no more than a line in the log."""
    pages = {page.stem for page in (PACK / "web" / "docs").glob("*.md")}
    assert pages
    assert server.object_info().keys() >= pages, server.log()


def test_the_pack_is_loaded_without_an_error(server: ComfyServer) -> None:
    # Up to the first prompt: other tests of this server provoke errors.
    started = server.log().partition("got prompt")[0]
    lines = [line for line in started.splitlines() if PACK_NAME in line]
    assert any("seconds:" in line for line in lines), server.log()
    assert not [line for line in lines if "IMPORT FAILED" in line or "Error" in line]


def test_the_example_clip_is_placed(server: ComfyServer) -> None:
    assert (server.input / CLIP.name).read_bytes() == CLIP.read_bytes()


def test_users_checkpoints_are_listed_after_the_bundled(server: ComfyServer) -> None:
    folder = server.base / "models" / "s2dm"
    (folder / "mine").mkdir(exist_ok=True)
    shutil.copy(folder / "random.safetensors", folder / "mine" / "copy.safetensors")
    (folder / "notes.txt").write_text("not a checkpoint")
    schema = server.get("/object_info/S2DMCheckpointLoader")["S2DMCheckpointLoader"]
    kind, options = schema["input"]["required"]["checkpoint"]
    listed = kind if isinstance(kind, list) else options["options"]
    assert Path("mine/copy.safetensors") in map(Path, listed)
    assert not any("notes.txt" in name for name in listed)
    bundled = [name.endswith("(bundled)") for name in listed]
    assert bundled == sorted(bundled, reverse=True)
