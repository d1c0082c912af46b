"""The subgraphs that ComfyUI offers among its own, as blueprints."""

import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from browser import interface
from comfyui_graph import to_prompt
from comfyui_install import PACK, PACK_NAME
from comfyui_server import ComfyServer
from PIL import Image

pytestmark = pytest.mark.comfyui

BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
MOVE = "Move parts of a picture (S2DM)"
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


def test_the_server_lists_the_blueprints(server: ComfyServer) -> None:
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


def test_a_blueprint_runs(server: ComfyServer) -> None:
    """As the node that is put into a workflow: a picture in, its moved frames out."""
    workflow = json.loads((PACK / "subgraphs" / f"{MOVE}.json").read_text("utf-8"))
    Image.new("RGB", (64, 48), (200, 60, 40)).save(server.base / "input" / "red.png")
    (node,) = workflow["nodes"]
    node["inputs"][0]["link"], node["outputs"][0]["links"] = 1, [2]
    workflow["nodes"] += [
        {"id": 2, "type": "LoadImage", "widgets_values": ["red.png", "image"], "inputs": []},
        {
            "id": 3,
            "type": "PreviewImage",
            "widgets_values": [],
            "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
        },
    ]
    workflow["links"] = [[1, 2, 0, 1, 0, "IMAGE"], [2, 1, 0, 3, 0, "IMAGE"]]
    outputs = server.run(to_prompt(workflow, server.object_info()))
    assert len(outputs["3"]["images"]) == 16


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
