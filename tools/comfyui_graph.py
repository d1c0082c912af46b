"""Turn a workflow as the ComfyUI interface saves it into a prompt as the server takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
UPLOADS = {"image_upload", "video_upload", "audio_upload", "animated_image_upload"}
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
MUTED, BYPASSED = 2, 4
# In a subgraph, links to and from the outside have these in place of a node.
INSIDE, OUTSIDE = -10, -20

Node = Mapping[str, Any]
Workflow = Mapping[str, Any]
Schemas = Mapping[str, Any]


class WorkflowError(ValueError):
    """A workflow that cannot become a prompt, with the reason."""


class Graph(NamedTuple):
    """A workflow, or the inside of a node that is a subgraph.

    links: (source node, its output, target node, its input, type) by id. definitions: the inside
    of each kind of subgraph. prefix: of the ids that its nodes have in the prompt. node, outer:
    the subgraph's node, and the graph that it is in.
    """

    nodes: dict[int, Node]
    links: dict[int, tuple[int, int, int, int, str]]
    definitions: Mapping[str, Workflow]
    prefix: str = ""
    node: Node | None = None
    outer: Graph | None = None

    def inside(self, node: Node) -> Graph:
        return graph(
            self.definitions[node["type"]],
            self.definitions,
            prefix=f"{self.prefix}{node['id']}:",
            node=node,
            outer=self,
        )


def graph(workflow: Workflow, definitions: Mapping[str, Workflow], **place: Any) -> Graph:
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    rows = [
        [link[field] for field in fields] if isinstance(link, Mapping) else link
        for link in workflow["links"]
    ]
    links = {number: tuple(rest) for number, *rest in rows}
    return Graph({node["id"]: node for node in workflow["nodes"]}, links, definitions, **place)


def to_prompt(workflow: Workflow, schemas: Schemas) -> dict[str, Any]:
    """The API-format prompt of a UI-format workflow.

    schemas: the server's answer to /object_info. Notes are left out, muted nodes and whatever
    they feed are cut, bypassed nodes hand an input of the same type on, subgraphs are unpacked.
    Raises WorkflowError for a node that the server does not know.
    """
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    whole = graph(workflow, {subgraph["id"]: subgraph for subgraph in subgraphs})
    return dict(entries(whole, schemas))


def entries(graph: Graph, schemas: Schemas) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes of a graph as a prompt has them, by their ids."""
    for node in graph.nodes.values():
        kind = node["type"]
        if kind in (*NOTES, REROUTE, PRIMITIVE) or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if kind in graph.definitions:
            yield from entries(graph.inside(node), schemas)
            continue
        if kind not in schemas:
            raise WorkflowError(f"Node {node['id']} is a {kind}, which is not installed.")
        inputs = dict(widget_values(node, schemas[kind]["input"]))
        for socket in node.get("inputs", []):
            source = origin(graph, socket.get("link"))
            if source is not None:
                inputs[socket["name"]] = source
        yield (
            f"{graph.prefix}{node['id']}",
            {
                "class_type": kind,
                "inputs": inputs,
                "_meta": {"title": node.get("title") or schemas[kind]["display_name"]},
            },
        )


def widget_values(node: Node, inputs: Schemas) -> Iterator[tuple[str, Any]]:
    """Pairs of widget name and value of a node.

    The interface saves values by position, and adds two widgets of its own: what to do with a
    seed after each run, and an upload button after the required ones. Widgets that came with a
    newer version have no value in the file, and their default in the interface.
    """
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):
        yield from values.items()
        return
    remaining = iter(values)
    for group in ("required", "optional"):
        specifications = inputs.get(group, {})
        yield from named_values(specifications, remaining)
        if any(options_of(entry).keys() & UPLOADS for entry in specifications.values()):
            next(remaining, None)


def named_values(
    inputs: Schemas, remaining: Iterator[Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Take the values of these inputs from those that remain, with their names in the prompt."""
    for short, specification in inputs.items():
        name = prefix + short
        options = options_of(specification)
        kind = specification[0]
        # An input of several types, or with a widget made for it, names the widget.
        if not (is_widget(kind) or "widgetType" in options) or options.get("forceInput"):
            continue
        choices = kind if isinstance(kind, list) else options.get("options")
        value = next(remaining, default_of(options, choices))
        if value is not None:
            yield name, value
        if options.get("control_after_generate") or name in ("seed", "noise_seed"):
            next(remaining, None)
        if kind == DYNAMIC_COMBO:
            # Each choice has widgets of its own, which follow it.
            chosen = [choice["inputs"] for choice in choices if choice["key"] == value]
            for group in ("required", "optional"):
                for inner in chosen:
                    yield from named_values(inner.get(group, {}), remaining, f"{name}.")


def options_of(specification: Sequence[Any]) -> Mapping[str, Any]:
    return specification[1] if len(specification) > 1 else {}


def default_of(options: Mapping[str, Any], choices: Sequence[Any] | None) -> Any:
    if "default" in options or not choices:
        return options.get("default")
    first = choices[0]
    return first["key"] if isinstance(first, Mapping) else first


def is_widget(kind: Any) -> bool:
    """Whether the interface shows an input of this type as a widget."""
    return isinstance(kind, list) or kind in WIDGET_TYPES or kind == DYNAMIC_COMBO


def origin(graph: Graph, link: int | None) -> Any:
    """What a link hands on: [node id, output], the value of a primitive, or None if it is cut.

    Seen through bypassed nodes, reroutes and the borders of subgraphs.
    """
    if link is None or link not in graph.links:
        return None
    number, slot, _, _, kind = graph.links[link]
    if number == INSIDE:
        inputs = graph.definitions[graph.node["type"]]["inputs"]
        name = inputs[slot]["name"]
        source = origin(graph.outer, linked(graph.node, lambda socket: socket["name"] == name))
        if source is not None:
            return source
        # Widgets from the inside may be shown on the subgraph's node, which then has their values.
        shown = (entry["name"] for entry in inputs if is_widget(entry["type"]))
        return dict(zip(shown, graph.node.get("widgets_values") or (), strict=False)).get(name)
    node = graph.nodes[number]
    if node.get("mode", 0) == MUTED:
        return None
    if node.get("mode", 0) == BYPASSED:
        return origin(graph, linked(node, lambda socket: socket["type"] == kind))
    if node["type"] == REROUTE:
        return origin(graph, linked(node, lambda socket: True))
    if node["type"] == PRIMITIVE:
        return node["widgets_values"][0]
    if node["type"] in graph.definitions:
        inside = graph.inside(node)
        ends = (key for key, end in inside.links.items() if end[2:4] == (OUTSIDE, slot))
        return origin(inside, next(ends, None))
    return [f"{graph.prefix}{number}", slot]


def linked(node: Node, fits: Any) -> int | None:
    """The link of a node's first linked input that fits."""
    links = (socket.get("link") for socket in node.get("inputs", []) if fits(socket))
    return next((link for link in links if link is not None), None)
