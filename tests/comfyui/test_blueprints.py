"""The subgraphs that ComfyUI offers among its own, as blueprints."""

import json
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import interface
from comfyui_graph import to_prompt
from comfyui_install import PACK, PACK_NAME
from comfyui_server import ComfyServer
from PIL import Image

from s2dm.video.frames import from_uint8
from s2dm.video.pictures import image_pixels

pytestmark = pytest.mark.comfyui

BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
MOVE = "Move parts of a picture (S2DM)"
ANIMATE = "Animate picture by drawing (S2DM)"
each_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def inside(workflow: dict[str, Any]) -> dict[str, Any]:
    (subgraph,) = workflow["definitions"]["subgraphs"]
    return subgraph


@each_blueprint
def test_a_blueprint_is_one_node_of_its_subgraph(path: Path) -> None:
    # ComfyUI 0.3.75 reads it in the encoding of the system.
    workflow = json.loads(path.read_bytes().decode("ascii"))
    (node,) = workflow["nodes"]
    subgraph = inside(workflow)
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == path.stem
    for side in ("inputs", "outputs"):
        names = [[socket["name"] for socket in one[side]] for one in (node, subgraph)]
        assert names[0] == names[1]


def test_the_server_lists_the_blueprints(server: ComfyServer, comfyui: Path) -> None:
    if not (comfyui / "app" / "subgraph_manager.py").is_file():
        pytest.skip("this version knows no blueprints of custom nodes")
    listed = {
        entry["name"]: (key, entry)
        for key, entry in server.get("/global_subgraphs").items()
        if entry["source"] == "custom_node"
    }
    assert set(listed) == {path.stem for path in BLUEPRINTS}
    for path in BLUEPRINTS:
        key, entry = listed[path.stem]
        assert entry["info"]["node_pack"] == f"custom_nodes.{PACK_NAME}"
        data = server.get(f"/global_subgraphs/{urllib.parse.quote(key)}")["data"]
        assert json.loads(data) == json.loads(path.read_text("utf-8"))


@each_blueprint
def test_the_sockets_of_a_blueprint_are_those_of_the_nodes(server: ComfyServer, path: Path) -> None:
    schemas = server.object_info()
    subgraph = inside(json.loads(path.read_text("utf-8")))
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    for node in nodes.values():
        schema = schemas[node["type"]]
        known = {**schema["input"]["required"], **schema["input"].get("optional", {})}
        assert {socket["name"] for socket in node["inputs"]} <= set(known)
        assert [socket["type"] for socket in node["outputs"]] == schema["output"]
    for link in subgraph["links"]:
        if link["target_id"] in nodes:
            socket = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert socket["link"] == link["id"] and socket["type"] == link["type"]


def put_in(path: Path, given: list[str], taken: list[str]) -> dict[str, Any]:
    """A workflow with the blueprint's node (1) and nothing else.

    Its inputs have the links 1, 2, …, its outputs those that follow, of these types.
    """
    workflow = json.loads(path.read_text("utf-8"))
    (node,) = workflow["nodes"]
    assert [socket["type"] for socket in node["inputs"]] == given
    assert [socket["type"] for socket in node["outputs"]] == taken
    for number, socket in enumerate(node["inputs"], 1):
        socket["link"] = number
    for number, socket in enumerate(node["outputs"], len(given) + 1):
        socket["links"] = [number]
    return workflow


def takes(name: str, kind: str, link: int) -> list[dict[str, Any]]:
    return [{"name": name, "type": kind, "link": link}]


def test_a_blueprint_runs(server: ComfyServer) -> None:
    """As the node that is put into a workflow: a picture in, its moved frames out."""
    workflow = put_in(
        PACK / "subgraphs" / f"{MOVE}.json", ["IMAGE"], ["IMAGE", "MASK", "S2DM_FLOW"]
    )
    Image.new("RGB", (64, 48), (200, 60, 40)).save(server.base / "input" / "red.png")
    workflow["nodes"] += [
        {"id": 2, "type": "LoadImage", "widgets_values": ["red.png", "image"]},
        {"id": 3, "type": "PreviewImage", "inputs": takes("images", "IMAGE", 2)},
    ]
    workflow["links"] = [[1, 2, 0, 1, 0, "IMAGE"], [2, 1, 0, 3, 0, "IMAGE"]]
    outputs = server.run(to_prompt(workflow, server.object_info()))
    assert len(outputs["3"]["images"]) == 16


@pytest.mark.slow
def test_a_picture_is_animated_by_its_blueprint(server: ComfyServer, checkpoint: str) -> None:
    """With what is drawn in the template: one forearm moves, all else stays as the picture is."""
    given = ["IMAGE", "MODEL", "VAE", "CONDITIONING", "CONDITIONING"]
    workflow = put_in(PACK / "subgraphs" / f"{ANIMATE}.json", given, ["IMAGE", "S2DM_FLOW"])
    template = json.loads((PACK / "workflows" / "s2dm_draw_motion.json").read_text("utf-8"))
    inner, drawn = (
        next(node for node in graph["nodes"] if node["type"] == "S2DMDrawFlow")
        for graph in (inside(workflow), template)
    )
    inner["widgets_values"][0] = drawn["widgets_values"][0]
    example = PACK / "workflows" / "s2dm_example.png"
    shutil.copy(example, server.input)
    prompt = "A woman, wearing an orange hoodie and black jeans is wave"
    workflow["nodes"] += [
        {"id": 2, "type": "LoadImage", "widgets_values": [example.name, "image"]},
        {"id": 3, "type": "S2DMCheckpointLoader", "widgets_values": [checkpoint, 0]},
        *(
            {
                "id": number,
                "type": "CLIPTextEncode",
                "widgets_values": [text],
                "inputs": takes("clip", "CLIP", number + 4),
            }
            for number, text in ((4, prompt), (5, ""))
        ),
        {"id": 6, "type": "PreviewImage", "inputs": takes("images", "IMAGE", 6)},
        {"id": 7, "type": "S2DMVisualizeFlow", "inputs": takes("flow", "S2DM_FLOW", 7)},
    ]
    workflow["links"] = [
        [1, 2, 0, 1, 0, "IMAGE"],
        [2, 3, 0, 1, 1, "MODEL"],
        [3, 3, 2, 1, 2, "VAE"],
        [4, 4, 0, 1, 3, "CONDITIONING"],
        [5, 5, 0, 1, 4, "CONDITIONING"],
        [6, 1, 0, 6, 0, "IMAGE"],
        [7, 1, 1, 7, 0, "S2DM_FLOW"],
        [8, 3, 1, 4, 0, "CLIP"],
        [9, 3, 1, 5, 0, "CLIP"],
    ]
    outputs = server.run(to_prompt(workflow, server.object_info()), timeout=600)
    frames, flow = (
        torch.stack([picture(file) for file in server.files({node: outputs[node]})])
        for node in ("6", "7")
    )
    assert frames.shape == flow.shape == (16, 3, 128, 128)
    moving = (flow < 0.99).any(dim=1).any(dim=0)  # white is at rest
    assert 100 < moving.sum() < 1500
    if checkpoint.endswith("(bundled)"):
        still = (frames - picture(example)).abs().mean(dim=1)
        assert still[0].mean() < 0.02, "frame 1 is not the picture"
        assert still[:, ~moving].mean(dim=1).max() < 0.03
        assert still[:, moving].mean(dim=1).max() > 0.1, "the forearm stands still"


def picture(path: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return from_uint8(image_pixels(Image.open(path)))


@pytest.mark.frontend
@pytest.mark.slow
def test_the_interface_opens_the_blueprints(server: ComfyServer) -> None:
    with interface(server, "S2DMDrawFlow") as page:
        for path in BLUEPRINTS:
            workflow = json.loads(path.read_text("utf-8"))
            inner = page.evaluate(
                """async workflow => {
                    await app.loadGraphData(workflow);
                    const [node] = app.graph.nodes;
                    return node.subgraph.nodes.map(inner => [
                        inner.type, inner.has_errors ?? false, inner.inputs.map(i => i.name)]);
                }""",
                workflow,
            )
            kinds = [node["type"] for node in inside(workflow)["nodes"]]
            assert [kind for kind, *_ in inner] == kinds
            assert not any(wrong for _, wrong, _ in inner)
            prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
            assert sorted(entry["class_type"] for entry in prompt.values()) == sorted(kinds)
            (drawn,) = (e for e in prompt.values() if e["class_type"] == "S2DMDrawFlow")
            assert drawn["inputs"]["frames"] == 16 and drawn["inputs"]["motion"] == ""
