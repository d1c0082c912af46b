"""The motion editor in a page of ComfyUI's interface, and hands to work on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from comfyui_server import ComfyServer

NODE = "S2DMDrawFlow"
SIDE = 1024  # of the picture
GRAPH = """async ([name, picture]) => {
    await app.loadGraphData({
        last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {}, extra: {},
        version: 0.4});
    const add = (type, x, y) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const load = add('LoadImage', 20, 60), draw = add(name, 420, 60);
    const keep = add('KeepFlow', 1200, 60);
    load.widgets.find(w => w.name === 'image').value = picture;
    load.connect(0, draw, draw.inputs.findIndex(i => i.name === 'image'));
    draw.connect(draw.outputs.findIndex(o => o.type === 'S2DM_FLOW'), keep, 0);
}"""
EDITOR = """() => {
    const node = (app.canvas.graph ?? app.graph).nodes.find(n => n.type === 'S2DMDrawFlow');
    const widget = node.widgets.find(w => w.name === 'motion');
    return {node, widget, canvas: widget.element.querySelector('canvas')};
}"""
# The place in the page of a pixel of the picture, while all of it is shown.
PLACE = f"""([x, y]) => {{
    const {{widget, canvas}} = ({EDITOR})();
    const r = canvas.getBoundingClientRect(), w = canvas.clientWidth, h = canvas.clientHeight;
    const scale = 0.96 * Math.min(w, h) / {SIDE}, seen = r.width / w;
    return [r.left + seen * ((w - {SIDE} * scale) / 2 + (x + 0.5) * scale),
            r.top + seen * ((h - {SIDE} * scale) / 2 + (y + 0.5) * scale)];
}}"""
COLOUR = f"""([x, y]) => {{
    const {{canvas}} = ({EDITOR})();
    const r = canvas.getBoundingClientRect();
    const at = [(x - r.left) * canvas.width / r.width, (y - r.top) * canvas.height / r.height];
    return [...canvas.getContext('2d').getImageData(...at.map(Math.round), 1, 1).data].slice(0, 3);
}}"""


class Editing:
    """A page with one Draw Motion node on a picture, and hands to work on it."""

    def __init__(self, page: Any, server: ComfyServer, renderer: str) -> None:
        self.page, self.server, self.renderer = page, server, renderer

    def open(self, scale: float = 1.0) -> None:
        self.page.evaluate(GRAPH, [NODE, "square.png"])
        self.zoom(scale)
        self.page.wait_for_function(f"() => ({EDITOR})().canvas.width > 300")
        self.page.wait_for_timeout(500)

    def zoom(self, scale: float) -> None:
        self.page.evaluate(
            "scale => { Object.assign(app.canvas.ds, {scale, offset: [40 / scale, 90 / scale]});"
            " app.canvas.setDirty(true, true); }",
            scale,
        )
        self.page.wait_for_timeout(500)

    @property
    def text(self) -> str:
        return self.page.evaluate(f"() => ({EDITOR})().widget.value")

    @property
    def motion(self) -> dict[str, Any]:
        return json.loads(self.text)

    @property
    def shown(self) -> bool:
        """Whether the editor in the page is the node's own."""
        return self.page.evaluate(
            f"() => {{ const seen = [...document.querySelectorAll('.s2dm-editor')].filter("
            f" e => e.checkVisibility()); return seen.length === 1"
            f" && seen[0] === ({EDITOR})().widget.element; }}"
        )

    @property
    def box(self) -> Any:
        """The editor in the page."""
        return self.page.locator(".s2dm-editor").filter(visible=True)

    def place(self, x: float, y: float) -> list[float]:
        return self.page.evaluate(PLACE, [x, y])

    def colour(self, x: float, y: float) -> list[int]:
        return self.page.evaluate(COLOUR, self.place(x, y))

    def drag(self, *points: tuple[float, float]) -> None:
        places = [self.place(*point) for point in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=4)
        self.page.mouse.up()

    def click(self, x: float, y: float) -> None:
        self.page.mouse.click(*self.place(x, y))
        self.page.wait_for_timeout(60)

    def leave(self) -> None:
        """Click beside the node: the focus is the graph's."""
        self.page.mouse.click(1850, 1150)
        self.page.wait_for_timeout(300)

    def keep_picture(self, name: str) -> None:
        if folder := os.environ.get("S2DM_SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}_{self.renderer}.png"))
