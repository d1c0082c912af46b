"""What the pack does to ComfyUI when it starts: little, and all of its nodes are there."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui_install import PACK_NAME, prepare_base
from comfyui_server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

NODES = {
    "S2DMCheckpointLoader",
    "S2DMApplyFlowAdapter",
    "S2DMEstimateFlow",
    "S2DMEncodeFlow",
    "S2DMSharedNoiseKSampler",
    "S2DMSharedNoise",
    "S2DMSharedNoiseSampler",
    "S2DMVisualizeFlow",
}
NEVER_AT_START = ("diffusers", "cv2", "matplotlib")


@pytest.fixture(scope="module")
def bare(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server where importing what the nodes must not import at start fails."""
    blocked = tmp_path_factory.mktemp("blocked")
    for name in NEVER_AT_START:
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    base = prepare_base(tmp_path_factory.mktemp("bare"))
    (base / "input" / "s2dm_example.mp4").write_bytes(b"the user's own")
    environment = {"PYTHONPATH": str(blocked)}
    with ComfyServer(comfyui, base, ["--cpu"], environment=environment) as running:
        yield running


def test_all_nodes_are_there_without_the_heavy_packages(bare: ComfyServer) -> None:
    assert bare.object_info().keys() >= NODES, bare.log()


def test_the_pack_adds_at_most_half_a_second_to_the_start(
    server: ComfyServer, bare: ComfyServer
) -> None:
    """By ComfyUI's own account; the better of two starts, as the first may compile files."""
    starts = [re.search(rf"([\d.]+) seconds: .*{PACK_NAME}", run.log()) for run in (server, bare)]
    assert all(starts), f"{PACK_NAME} is not among the import times:\n{bare.log()}"
    assert min(float(start[1]) for start in starts) <= 0.5


def test_each_node_has_a_help_page(bare: ComfyServer) -> None:
    pages = bare.base / "custom_nodes" / PACK_NAME / "web" / "docs"
    assert {page.stem for page in pages.glob("*.md")} >= NODES


def test_each_socket_and_widget_has_a_tooltip(bare: ComfyServer) -> None:
    for name, schema in bare.object_info().items():
        if name not in NODES:
            continue
        assert schema["description"] and all(schema["output_tooltips"]), name
        for inputs in (schema["input"].get("required", {}), schema["input"].get("optional", {})):
            for socket, (_, *options) in inputs.items():
                assert options and options[0].get("tooltip"), f"{name}.{socket}"


def test_the_example_clip_is_placed_once(server: ComfyServer, bare: ComfyServer) -> None:
    """In a fresh input folder, and never over a file of the user's."""
    clip = Path(server.base) / "custom_nodes" / PACK_NAME / "workflows" / "s2dm_example.mp4"
    placed = server.input / clip.name
    assert placed.read_bytes() == clip.read_bytes()
    assert (bare.input / clip.name).read_bytes() == b"the user's own"


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
