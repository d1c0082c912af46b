"""Each bundled workflow runs on a real server as it is bundled, and is fit to be a template."""

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui_graph import to_prompt
from comfyui_install import PACK, PACK_NAME
from comfyui_server import ComfyServer
from safetensors.torch import load_file

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.models import read_config
from s2dm.video import read_clip

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
FRAMES, SIZE = 16, 128
# The videos that each workflow writes, with how many pictures stand side by side in them.
VIDEOS = {
    "flow_to_video": {"flow_to_video": 1, "side_by_side": 3},
    "shared_vs_independent_noise": {"shared_vs_independent_noise": 3},
    "text_to_video": {"text_to_video": 1, "flow_and_video": 2},
    "animate_reference": {"animate_reference": 1, "flow_and_animation": 2},
}

BUNDLED = sorted((PACK / "s2dm" / "assets").glob("*.safetensors"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def skip_without_stage_1(path: Path) -> None:
    """Skip the test if the template needs a part that the bundled checkpoint lacks."""
    generates = any(node["type"] == "S2DMGenerateFlow" for node in read(path)["nodes"])
    if generates and BUNDLED and read_config(BUNDLED[0]).flow_generator is None:
        pytest.skip("the bundled checkpoint holds stage 2 alone (no part flow_generator)")


def test_every_workflow_is_accounted_for() -> None:
    assert {path.stem for path in WORKFLOWS} == set(VIDEOS)


@each_workflow
def test_a_template_has_a_thumbnail_a_note_and_fixed_seeds(path: Path) -> None:
    nodes = read(path)["nodes"]
    assert any(node["type"] == "MarkdownNote" for node in nodes)
    assert any(node["type"] == "S2DMSharedNoiseKSampler" for node in nodes)
    changing = {"randomize", "increment", "decrement"}
    assert not [node for node in nodes if changing & set(map(str, node.get("widgets_values", ())))]
    assert all(node.get("mode", 0) == 0 for node in nodes), "a node is muted or bypassed"
    skip_without_stage_1(path)  # only then can its picture be made
    assert path.with_suffix(".jpg").is_file()


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


def prompt_of(path: Path, server: ComfyServer, checkpoint: str) -> dict[str, Any]:
    """The prompt of a template, with the checkpoint to test with."""
    skip_without_stage_1(path)
    prompt = to_prompt(read(path), server.object_info())
    for node in of_type(prompt, "S2DMCheckpointLoader"):
        if checkpoint.endswith("(bundled)"):
            assert prompt[node]["inputs"]["checkpoint"] == checkpoint
        prompt[node]["inputs"]["checkpoint"] = checkpoint
    return prompt


def of_type(prompt: dict[str, Any], kind: str) -> list[str]:
    return [node for node, entry in prompt.items() if entry["class_type"] == kind]


@pytest.mark.comfyui
@each_workflow
def test_a_template_samples_as_the_checkpoint_recommends(server: ComfyServer, path: Path) -> None:
    prompt = to_prompt(read(path), server.object_info())
    advice = read_config(DEFAULT_CHECKPOINT).sampling
    for node in of_type(prompt, "S2DMSharedNoiseKSampler"):
        settings = prompt[node]["inputs"]
        assert (settings["steps"], settings["cfg"]) == (advice.steps, advice.guidance_scale)
    for node in of_type(prompt, "S2DMEncodeFlow"):
        settings = prompt[node]["inputs"]
        assert settings["start_percent"] == advice.flow_start
        # On guides both together; off is a flow scale of 1.
        assert settings["guide_flow"] == (advice.flow_guidance_scale is None)
        assert advice.flow_guidance_scale in (None, 1)


@pytest.mark.slow
@pytest.mark.comfyui
@each_workflow
def test_the_workflow_runs_as_bundled(server: ComfyServer, checkpoint: str, path: Path) -> None:
    prompt = prompt_of(path, server, checkpoint)
    files = server.files(server.run(prompt, timeout=900))
    videos = {file.name.rsplit("_", 2)[0]: file for file in files if file.suffix == ".mp4"}
    assert set(videos) == set(VIDEOS[path.stem])
    for name, pictures in VIDEOS[path.stem].items():
        frames, _ = read_clip(videos[name])
        assert tuple(frames.shape) == (FRAMES, 3, SIZE, SIZE * pictures)
        panels = frames.chunk(pictures, dim=-1)
        assert all(panel.std() > 0.01 for panel in panels), "a picture is blank"


@pytest.mark.slow
@pytest.mark.comfyui
@pytest.mark.parametrize("name", ["text_to_video", "animate_reference"])
def test_the_clip_starts_with_its_reference_frame(
    server: ComfyServer, checkpoint: str, name: str
) -> None:
    """Latents of the frame and of the clip, as the two samplers of the template give them."""
    prompt = prompt_of(PACK / "workflows" / f"{name}.json", server, checkpoint)
    samplers = of_type(prompt, "S2DMSharedNoiseKSampler")
    assert len(samplers) == 2
    for node in [*of_type(prompt, "SaveVideo"), *of_type(prompt, "SaveImage")]:
        del prompt[node]
    for node in samplers:
        prompt[f"latent of {node}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [node, 0], "filename_prefix": f"{name}_{node}"},
        }
    outputs = server.run(prompt, timeout=900)
    frame, clip = (
        load_file(server.files({node: outputs[f"latent of {node}"]})[0])["latent_tensor"]
        for node in samplers
    )
    assert (len(frame), len(clip)) == (1, FRAMES)
    # Latents of random weights have no scale of their own.
    scale = 1 if checkpoint.endswith("(bundled)") else float(frame.std())
    assert (clip[0] - frame[0]).abs().max() <= 1e-4 * scale
    assert (clip[1:] - frame).abs().amax((1, 2, 3)).min() > 1e-2 * scale
