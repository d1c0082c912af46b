"""Each bundled workflow runs on a real server as it is bundled, and is fit to be a template."""

import json
from pathlib import Path

import pytest
from comfyui_graph import to_prompt
from comfyui_install import PACK, PACK_NAME
from comfyui_server import ComfyServer

from s2dm.video import read_clip

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
FRAMES, SIZE = 16, 128
# The videos that each workflow writes, with how many pictures stand side by side in them.
VIDEOS = {
    "flow_to_video": {"flow_to_video": 1, "side_by_side": 3},
    "shared_vs_independent_noise": {"shared_vs_independent_noise": 3},
}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_every_workflow_is_accounted_for() -> None:
    assert {path.stem for path in WORKFLOWS} == set(VIDEOS)


@each_workflow
def test_a_template_has_a_thumbnail_a_note_and_fixed_seeds(path: Path) -> None:
    nodes = read(path)["nodes"]
    assert path.with_suffix(".jpg").is_file()
    assert any(node["type"] == "MarkdownNote" for node in nodes)
    samplers = [node for node in nodes if node["type"] == "S2DMSharedNoiseKSampler"]
    assert samplers
    assert all(node["widgets_values"][1] == "fixed" for node in samplers)
    assert all(node.get("mode", 0) == 0 for node in nodes), "a node is muted or bypassed"


@pytest.mark.comfyui
@each_workflow
def test_a_template_uses_core_nodes_and_ours_alone(server: ComfyServer, path: Path) -> None:
    schemas = server.object_info()
    for node in read(path)["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        module = schemas[node["type"]]["python_module"]
        assert module.startswith(("nodes", "comfy_extras.")) or module.endswith(PACK_NAME), node


@pytest.mark.comfyui
@each_workflow
def test_the_interface_is_offered_the_template(server: ComfyServer, path: Path) -> None:
    assert path.stem in server.get("/api/workflow_templates")[PACK_NAME]
    assert server.get(f"/api/workflow_templates/{PACK_NAME}/{path.name}") == read(path)


@pytest.mark.slow
@pytest.mark.comfyui
@each_workflow
def test_the_workflow_runs_as_bundled(server: ComfyServer, checkpoint: str, path: Path) -> None:
    prompt = to_prompt(read(path), server.object_info())
    for node in prompt.values():
        if node["class_type"] == "S2DMCheckpointLoader":
            if checkpoint.endswith("(bundled)"):
                assert node["inputs"]["checkpoint"] == checkpoint
            node["inputs"]["checkpoint"] = checkpoint
    files = server.files(server.run(prompt, timeout=900))
    videos = {file.name.rsplit("_", 2)[0]: file for file in files if file.suffix == ".mp4"}
    assert set(videos) == set(VIDEOS[path.stem])
    for name, pictures in VIDEOS[path.stem].items():
        frames, _ = read_clip(videos[name])
        assert tuple(frames.shape) == (FRAMES, 3, SIZE, SIZE * pictures)
        panels = frames.chunk(pictures, dim=-1)
        assert all(panel.std() > 0.01 for panel in panels), "a picture is blank"
