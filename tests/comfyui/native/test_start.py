"""The start on a machine whose folders can't be read or written: the pack keeps its nodes."""

import asyncio
import logging
import os
from pathlib import Path

import pytest
from comfyui_install import PACK

pytestmark = pytest.mark.comfyui

NODES = len([*(PACK / "web" / "docs").glob("S2DM*.md")])  # each has a help page


@pytest.fixture
def places(comfy, tmp_path, monkeypatch):
    """Folders of ComfyUI's for one test, as it finds them at its first start."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(
        folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths)
    )
    folder_paths.folder_names_and_paths.pop("s2dm", None)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "input").mkdir()
    return folder_paths


def start(pack) -> list[str]:
    """What core does with the pack: ask for its nodes, and each node for its schema."""

    async def collect():
        extension = await pack.comfy_entrypoint()
        return await extension.get_node_list()

    return [node.GET_SCHEMA().node_id for node in asyncio.run(collect())]


def listed(pack, node: str = "S2DMCheckpointLoader") -> list[str]:
    async def collect():
        return await (await pack.comfy_entrypoint()).get_node_list()

    (loader,) = (n for n in asyncio.run(collect()) if n.GET_SCHEMA().node_id == node)
    return loader.define_schema().inputs[0].options


def test_the_folder_for_checkpoints_is_made(pack, places, tmp_path):
    assert len(start(pack)) == NODES
    assert (tmp_path / "models" / "s2dm").is_dir()
    assert not (tmp_path / "output").exists()
    assert start(pack)  # and again, with the folder there


def test_checkpoints_that_core_saved_are_listed(pack, places, tmp_path):
    for folder, name in (("models", "mine"), ("output", "saved_00001_")):
        (tmp_path / folder / "s2dm").mkdir(parents=True)
        (tmp_path / folder / "s2dm" / f"{name}.safetensors").touch()
    names = listed(pack)
    assert "mine.safetensors" in names and "saved_00001_.safetensors" in names
    assert places.get_folder_paths("s2dm")[0] == str(tmp_path / "models" / "s2dm")


def refuse(error: OSError):
    def call(*args, **kwargs):
        raise error

    return call


def unreadable_input(places, tmp_path, monkeypatch):
    # To the system, a name that can't be asked for at all.
    monkeypatch.setattr(places, "input_directory", str(tmp_path / ("x" * 300)))


def forbidden_input(places, tmp_path, monkeypatch):
    """Permission denied, or a mount whose server is gone; the tests' user may do everything."""
    asked = os.stat

    def stat(path, *args, **kwargs):
        if "input" in str(path) and "s2dm_example" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return asked(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)


def read_only_models(places, tmp_path, monkeypatch):
    (tmp_path / "models").write_text("a file where a folder should be")


def unreadable_models(places, tmp_path, monkeypatch):
    error = OSError(107, "Transport endpoint is not connected")
    monkeypatch.setattr(places, "get_filename_list", refuse(error))


def unreadable_assets(places, tmp_path, monkeypatch):
    glob = Path.glob

    def fail(self, pattern, *args, **kwargs):
        if self.name == "assets":
            raise PermissionError(13, "Permission denied", str(self))
        return glob(self, pattern, *args, **kwargs)

    monkeypatch.setattr(Path, "glob", fail)


@pytest.mark.parametrize(
    "broken",
    [unreadable_input, forbidden_input, read_only_models, unreadable_models, unreadable_assets],
)
def test_one_broken_folder_costs_no_node(pack, places, tmp_path, monkeypatch, caplog, broken):
    broken(places, tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert len(start(pack)) == NODES
        names = listed(pack)
    assert "S2DM" in caplog.text or "example clip" in caplog.text
    assert any("(bundled)" in name for name in names) or broken is unreadable_assets
