"""Each bundled workflow opens in the real interface, drawn on a canvas and as Nodes 2.0.

Needs Playwright and a Chromium on the path; skipped otherwise. `S2DM_SCREENSHOTS=folder` keeps a
picture of each workflow.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import RENDERERS, drawn_by, interface, interface_version
from comfyui_graph import to_prompt
from comfyui_install import PACK
from comfyui_server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.frontend, pytest.mark.slow]

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
WRAPS_TEXT = (1, 28)  # from this interface on, Nodes 2.0 gives nodes the width that they ask for
# Where everything is, in the graph's own units. A node that is an element may have parts that
# stand out of it, such as the button for its advanced inputs.
BOXES = """elements => {
    const view = app.canvas.ds, origin = app.canvas.canvas.getBoundingClientRect();
    const toGraph = r => [
        (r.left - origin.left) / view.scale - view.offset[0],
        (r.top - origin.top) / view.scale - view.offset[1],
        r.width / view.scale, r.height / view.scale];
    const union = rects => {
        const left = Math.min(...rects.map(r => r.left)), top = Math.min(...rects.map(r => r.top));
        const right = Math.max(...rects.map(r => r.right));
        const bottom = Math.max(...rects.map(r => r.bottom));
        return {left, top, width: right - left, height: bottom - top};
    };
    const elementOf = node => document.querySelector(`[data-node-id="${node.id}"]`);
    const boxOf = node => {
        if (!elements) {
            const title = LiteGraph.NODE_TITLE_HEIGHT;
            return [node.pos[0], node.pos[1] - title, node.size[0], node.size[1] + title];
        }
        const buttons = [...elementOf(node).querySelectorAll('button')].filter(
            b => b.innerText && b.offsetParent);
        return toGraph(union([elementOf(node), ...buttons].map(e => e.getBoundingClientRect())));
    };
    const textOf = node => {
        if (node.type !== 'MarkdownNote') return null;
        const words = node.widgets[0].value.replace(/[#*]/g, '').trim().split('\\n');
        const ends = [words[0].trim(), words.at(-1).trim()];
        const shown = [...document.querySelectorAll('h1, p')].filter(
            e => e.offsetParent && ends.includes(e.innerText.trim()));
        if (shown.length < 2) return null;
        return toGraph(union(shown.map(e => e.getBoundingClientRect())));
    };
    const pen = document.createElement('canvas').getContext('2d');
    const titleOf = group => {
        pen.font = `${group.font_size ?? 24}px Inter, Arial, sans-serif`;
        return pen.measureText(group.title).width;
    };
    return {
        nodes: app.graph.nodes.map(node => (
            {name: node.title, type: node.type, box: boxOf(node), text: textOf(node)})),
        groups: app.graph.groups.map(group => (
            {name: group.title, box: [...group.pos, ...group.size], title: titleOf(group)})),
    };
}"""
SHOW_ALL = """() => {
    const items = [...app.graph.nodes, ...app.graph.groups];
    const boxes = items.map(item => [...item.pos, ...item.size]);
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    const right = Math.max(...boxes.map(b => b[0] + b[2]));
    const bottom = Math.max(...boxes.map(b => b[1] + b[3]));
    const view = app.canvas.ds;
    const space = [innerWidth - 120, innerHeight - 160];
    view.scale = Math.min(space[0] / (right - left), space[1] / (bottom - top));
    view.offset[0] = 80 / view.scale - left;
    view.offset[1] = 120 / view.scale - top;
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[Any]:
    with interface(server, "S2DMEncodeFlow") as page:
        yield page


@pytest.fixture(scope="module", params=RENDERERS)
def renderer(page: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != RENDERERS[0] and interface_version() < WRAPS_TEXT:
        pytest.skip("the Nodes 2.0 of this interface makes a note as wide as its longest line")
    with drawn_by(page, request.param) as renderer:
        yield renderer


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_interface_shows_the_workflow(
    page: Any, renderer: str, server: ComfyServer, path: Path
) -> None:
    workflow = json.loads(path.read_text("utf-8"))
    missing = page.evaluate(
        "types => types.filter(type => !(type in LiteGraph.registered_node_types))",
        sorted({node["type"] for node in workflow["nodes"]}),
    )
    assert missing == []
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function(f"() => app.graph.nodes.length === {len(workflow['nodes'])}")
    assert page.locator(".p-toast-message-warn, .p-toast-message-error").count() == 0
    page.wait_for_timeout(2000)  # previews load, nodes take their sizes
    page.evaluate(SHOW_ALL)
    page.wait_for_timeout(1000)
    if folder := os.environ.get("S2DM_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{path.stem}_{renderer}.png"))

    boxes = page.evaluate(BOXES, renderer != RENDERERS[0])
    assert len(boxes["nodes"]) == len(workflow["nodes"])
    for one, other in itertools.combinations(boxes["nodes"], 2):
        assert not overlap(one["box"], other["box"]), f"{one['name']} covers {other['name']}"
    for group, node in itertools.product(boxes["groups"], boxes["nodes"]):
        if overlap(group["box"], node["box"]):
            assert inside(node["box"], group["box"]), f"{node['name']} sticks out of its group"
    for group in boxes["groups"]:
        assert group["title"] < group["box"][2], f"{group['name']} is wider than its group"
    # The note's first line and its last one lie in its box.
    (note,) = (node for node in boxes["nodes"] if node["type"] == "MarkdownNote")
    assert note["text"] is not None, "the note is not shown"
    assert inside(note["text"], note["box"]), "the note is cut"

    shown = page.evaluate("async () => (await app.graphToPrompt()).output")
    ours = to_prompt(workflow, server.object_info())
    assert shown.keys() == ours.keys()
    for node, entry in ours.items():
        # The interface adds what only it has, such as the preview of a video.
        assert shown[node]["inputs"].items() >= entry["inputs"].items(), entry["class_type"]


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes (left, top, width, height) have an area in common."""
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def inside(one: list[float], other: list[float]) -> bool:
    """Whether the first box lies in the second one."""
    return all(
        other[axis] <= one[axis] and one[axis] + one[axis + 2] <= other[axis] + other[axis + 2]
        for axis in (0, 1)
    )
