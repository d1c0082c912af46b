"""Workflows of the interface as prompts: what a file may hold beside nodes and links.

Checked against the interface itself (ComfyUI 0.33.0, frontend 1.49.6) on 31 official templates.
"""

from typing import Any

import pytest
from comfyui_graph import to_prompt

FORMATS = [
    {
        "key": "mp4",
        "inputs": {
            "required": {
                "codec": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "auto", "inputs": {}},
                            {"key": "h264", "inputs": {"required": {"crf": ["FLOAT", {}]}}},
                        ]
                    },
                ],
                "seed": ["INT", {}],
            },
            "optional": {"tag": ["STRING", {"default": "none"}]},
        },
    },
    {"key": "gif", "inputs": {"required": {}}},
]
SCHEMAS = {
    name: {"display_name": name, "input": inputs}
    for name, inputs in {
        "Load": {"required": {"file": [["a", "b"], {"image_upload": True}]}},
        "Filter": {
            "required": {"image": ["IMAGE", {}], "seed": ["INT", {"default": 4}]},
            "optional": {"rate": ["FLOAT,INT", {"widgetType": "FLOAT", "default": 2.0}]},
        },
        "Save": {
            "required": {
                "image": ["IMAGE", {}],
                "format": ["COMFY_DYNAMICCOMBO_V3", {"options": FORMATS}],
            },
            "optional": {
                "name": ["STRING", {"default": "file"}],
                "depth": ["COMBO", {"options": [8, 10]}],
            },
        },
    }.items()
}


def node(number: int, kind: str, values: Any = (), link: int | None = None, **fields: Any) -> dict:
    """A node with one image socket."""
    inputs = [{"name": "image", "type": "IMAGE", "link": link}]
    return {"id": number, "type": kind, "widgets_values": values, "inputs": inputs, **fields}


def inputs_of(*nodes: dict, links: Any = (), **fields: Any) -> dict[str, dict[str, Any]]:
    prompt = to_prompt({"nodes": nodes, "links": links, **fields}, SCHEMAS)
    return {number: entry["inputs"] for number, entry in prompt.items()}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            ["mp4", "h264", 17, 5, "x", "clip", 10],
            {"format.codec": "h264", "format.codec.crf": 17, "format.seed": 5, "format.tag": "x"}
            | {"format": "mp4", "name": "clip", "depth": 10},
        ),
        (
            ["mp4", "auto", 5, "x", "clip"],
            {"format": "mp4", "format.codec": "auto", "format.seed": 5, "format.tag": "x"}
            | {"name": "clip", "depth": 8},
        ),
        (["gif", "clip"], {"format": "gif", "name": "clip", "depth": 8}),
        (
            [],
            {"format": "mp4", "format.codec": "auto", "format.tag": "none"}
            | {"name": "file", "depth": 8},
        ),
    ],
)
def test_a_choice_is_followed_by_its_own_widgets(values, expected) -> None:
    assert inputs_of(node(1, "Save", values)) == {"1": expected}


def test_a_widget_of_several_types_has_its_place() -> None:
    assert inputs_of(node(1, "Filter", [3, "fixed", 1.5])) == {"1": {"seed": 3, "rate": 1.5}}


def test_reroutes_and_primitives_are_seen_through() -> None:
    """And links may be objects, as in newer files."""
    sampler = node(3, "Filter", [3, "fixed"], link=2)
    sampler["inputs"].append({"name": "seed", "type": "INT", "link": 3})
    prompt = inputs_of(
        node(1, "Load", ["a", "image"]),
        node(2, "Reroute", link=1),
        sampler,
        {"id": 4, "type": "PrimitiveNode", "widgets_values": [99, "fixed"]},
        links=[
            [1, 1, 0, 2, 0, "IMAGE"],
            [2, 2, 0, 3, 0, "IMAGE"],
            {"id": 3, "origin_id": 4, "origin_slot": 0, "target_id": 3, "target_slot": 1}
            | {"type": "INT"},
        ],
    )
    assert prompt == {"1": {"file": "a"}, "3": {"image": ["1", 0], "seed": 99, "rate": 2.0}}


def test_a_subgraph_is_unpacked() -> None:
    """Its nodes, its links across the border, and the widgets that it shows."""
    inner = node(7, "Filter", [3, "fixed", 1.0], link=1)
    inner["inputs"].append({"name": "seed", "type": "INT", "link": 2})
    subgraph = {
        "id": "some-id",
        "nodes": [inner],
        "links": [
            [1, -10, 0, 7, 0, "IMAGE"],
            [2, -10, 1, 7, 1, "INT"],
            [3, 7, 0, -20, 0, "IMAGE"],
        ],
        "inputs": [{"name": "image", "type": "IMAGE"}, {"name": "seed", "type": "INT"}],
        "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
    }
    prompt = inputs_of(
        node(1, "Load", ["a", "image"]),
        node(2, "some-id", [55], link=1),
        node(3, "Save", ["gif"], link=2),
        links=[[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
        definitions={"subgraphs": [subgraph]},
    )
    assert prompt["2:7"] == {"image": ["1", 0], "seed": 55, "rate": 1.0}
    assert prompt["3"]["image"] == ["2:7", 0]
    assert set(prompt) == {"1", "2:7", "3"}
    # As files of older versions are: the value is the inner widget's.
    subgraph_without_values = node(2, "some-id", [], link=None)
    alone = inputs_of(subgraph_without_values, definitions={"subgraphs": [subgraph]})
    assert alone == {"2:7": {"seed": 3, "rate": 1.0}}
