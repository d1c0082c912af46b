"""Each bundled workflow runs on a real server as it is bundled, and is fit to be a template."""

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui_graph import to_prompt
from comfyui_install import PACK, PACK_NAME
from comfyui_server import ComfyServer
from PIL import Image
from safetensors.torch import load_file

from s2dm.models import read_config
from s2dm.video import read_clip
from s2dm.video.frames import from_uint8
from s2dm.video.pictures import image_pixels

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
FRAMES, SIZE = 16, 128
# The one video that each workflow writes, with how many pictures stand side by side in it.
VIDEOS = {
    "s2dm_flow_to_video": 1,
    "s2dm_shared_vs_independent_noise": 2,
    "s2dm_text_to_video": 1,
    "s2dm_animate_picture": 1,
    "s2dm_video_to_video": 1,
    "s2dm_draw_motion": 1,
    "s2dm_camera_move": 1,
    "s2dm_motion_transfer": 1,
    "s2dm_train_adapter": 1,
    "s2dm_use_adapter": 1,
}
MOST_NODES = 17  # with the note
PLAYER = 200  # least height of a played video, in pixels of the graph
ENCODING = ("strength", "start_percent", "end_percent", "guide_flow")

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
    # A search for the pack's name in the template browser finds them.
    assert all(path.stem.startswith("s2dm_") for path in WORKFLOWS)


@each_workflow
def test_a_template_has_a_thumbnail_a_note_and_fixed_seeds(path: Path) -> None:
    nodes = read(path)["nodes"]
    (note,) = (node for node in nodes if node["type"] == "MarkdownNote")
    assert "`" not in note["widgets_values"][0], "Nodes 2.0 shows code in a note unreadably"
    assert len(nodes) <= MOST_NODES
    assert any(node["type"] == "S2DMSharedNoiseKSampler" for node in nodes)
    changing = {"randomize", "increment", "decrement"}
    assert not [node for node in nodes if changing & set(map(str, node.get("widgets_values", ())))]
    assert all(node.get("mode", 0) == 0 for node in nodes), "a node is muted or bypassed"
    skip_without_stage_1(path)  # only then can its picture be made
    assert path.with_suffix(".jpg").is_file()


@each_workflow
def test_the_video_is_played_large_enough(path: Path) -> None:
    """Its node has room for the pictures side by side in its width, below its widgets."""
    (node,) = (node for node in read(path)["nodes"] if node["type"] == "SaveVideo")
    width, height = node["size"]
    assert min((width - 20) / VIDEOS[path.stem], height - 150) >= PLAYER


def test_what_the_bundled_checkpoint_can_follow_is_said_where_it_is_first_used() -> None:
    """In the note of the first template, and beside the README's quick start."""
    nodes = read(PACK / "workflows" / "s2dm_flow_to_video.json")["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    assert "one person, **seen whole" in note and "24 outfits" in note
    readme = (PACK / "README.md").read_text("utf-8")
    start = readme.split("## Quick start")[1].split("\n## ")[0]
    assert "What to expect of the bundled checkpoint" in start and "docs/results.md#limits" in start
    assert all(f"- **{topic}**" in start for topic in ("Motion", "Clothes", "Rooms", "Actions"))


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
    """Nobody has typed a setting into it that the checkpoint recommends."""
    schemas = server.object_info()
    prompt = to_prompt(read(path), schemas)
    left_alone = {"S2DMSharedNoiseKSampler": ("steps", "cfg"), "S2DMEncodeFlow": ENCODING}
    for kind, names in left_alone.items():
        inputs = schemas[kind]["input"]
        defaults = {
            name: specification[1].get("default")
            for group in inputs.values()
            for name, specification in group.items()
            if isinstance(specification, list) and len(specification) > 1
        }
        found = of_type(prompt, kind)
        assert found, kind
        for node in found:
            for name in names:
                assert prompt[node]["inputs"][name] == defaults[name], (kind, name)


@pytest.mark.comfyui
@each_workflow
def test_sizes_of_a_template_are_even_by_construction(server: ComfyServer, path: Path) -> None:
    """H.264 refuses odd sides at the very end of a run: the sides that a user sets step by 8."""
    schemas = server.object_info()
    nodes = {node["type"] for node in read(path)["nodes"]}
    # What core's own node makes of a picture, Encode Flow rounds up.
    nodes -= {"ImageScale"}
    sides = [
        schemas[kind]["input"][group][side][1]
        for kind in nodes
        for group in ("required", "optional")
        for side in ("width", "height")
        if side in schemas.get(kind, {}).get("input", {}).get(group, {})
    ]
    assert sides and all(side["step"] == 8 and side["min"] % 8 == 0 for side in sides)
    # Frames of a video reach the model through the node that fits them alone.
    assert ("LoadVideo" in nodes) == ("S2DMFitClip" in nodes)
    assert "GetVideoComponents" not in nodes


@pytest.mark.slow
@pytest.mark.comfyui
@each_workflow
def test_the_workflow_runs_as_bundled(server: ComfyServer, checkpoint: str, path: Path) -> None:
    prompt = prompt_of(path, server, checkpoint)
    files = server.files(server.run(prompt, timeout=900))
    (video,) = (file for file in files if file.suffix == ".mp4")
    assert video.name.startswith(path.stem.removeprefix("s2dm_"))
    pictures = VIDEOS[path.stem]
    frames, _ = read_clip(video)
    assert tuple(frames.shape) == (FRAMES, 3, SIZE, SIZE * pictures)
    panels = frames.chunk(pictures, dim=-1)
    assert all(panel.std() > 0.01 for panel in panels), "a picture is blank"
    starts_from_picture = bool(of_type(prompt, "LoadImage"))
    if starts_from_picture and checkpoint.endswith("(bundled)"):
        picture = from_uint8(image_pixels(Image.open(path.with_name("s2dm_example.png"))))
        assert (frames[0] - picture).abs().mean() < 0.03, "frame 1 is not the picture"
    shown = [file for file in files if file.parent.name == "temp"]
    flow = FRAMES if of_type(prompt, "S2DMVisualizeFlow") else 0
    # And the loss of a training, and the picture that motion is drawn on.
    others = of_type(prompt, "S2DMTrainFlowAdapter") + of_type(prompt, "S2DMDrawFlow")
    assert len(shown) == flow + len(others)


@pytest.mark.slow
@pytest.mark.comfyui
def test_without_the_anchor_the_clip_still_starts_with_its_reference_frame(
    server: ComfyServer, checkpoint: str
) -> None:
    """The paper's plain method: latents of frame and clip, from the two samplers."""
    name = "s2dm_text_to_video"
    prompt = prompt_of(PACK / "workflows" / f"{name}.json", server, checkpoint)
    samplers = of_type(prompt, "S2DMSharedNoiseKSampler")
    assert len(samplers) == 2
    (anchor,) = of_type(prompt, "S2DMAnchorToReference")
    for node in samplers:  # as a bypassed node hands it on
        if prompt[node]["inputs"]["model"][0] == anchor:
            prompt[node]["inputs"]["model"] = prompt[anchor]["inputs"]["model"]
    del prompt[anchor]
    for kind in ("SaveVideo", "SaveImage", "S2DMVisualizeFlow"):
        for node in of_type(prompt, kind):
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
    bundled = checkpoint.endswith("(bundled)")
    scale = 1 if bundled else float(frame.std())
    if bundled:
        # A batch of frames is rounded otherwise than one, and single latents amplify that.
        assert (clip[0] - frame[0]).norm() <= 3e-5 * frame.norm()
    else:
        assert (clip[0] - frame[0]).abs().max() <= 1e-4 * scale
    assert (clip[1:] - frame).abs().amax((1, 2, 3)).min() > 1e-2 * scale
