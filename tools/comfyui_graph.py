"""Turn a workflow as the ComfyUI interface saves it into a prompt as the server takes it."""

from collections.abc import Iterator, Mapping
from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload")
MUTED, BYPASSED = 2, 4

Workflow = Mapping[str, Any]
Schemas = Mapping[str, Any]


class WorkflowError(ValueError):
    """A workflow that cannot become a prompt, with the reason."""


def to_prompt(workflow: Workflow, schemas: Schemas) -> dict[str, Any]:
    """The API-format prompt of a UI-format workflow.

    schemas: the server's answer to /object_info. Notes are left out, muted nodes and whatever
    they feed are cut, bypassed nodes hand their first input of the same type on.
    Raises WorkflowError for a node that the server does not know.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote") or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in schemas:
            raise WorkflowError(f"Node {node['id']} is a {node['type']}, which is not installed.")
        inputs = dict(widget_values(node, schemas[node["type"]]["input"]))
        for socket in node.get("inputs", []):
            source = origin(socket.get("link"), nodes, links)
            if source is not None:
                inputs[socket["name"]] = source
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title") or schemas[node["type"]]["display_name"]},
        }
    return prompt


def widget_values(node: Mapping[str, Any], inputs: Schemas) -> Iterator[tuple[str, Any]]:
    """Pairs of widget name and value of a node.

    The interface saves values by position, and adds two widgets of its own: what to do with a
    seed after each run, and an upload button after the required ones.
    """
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):
        yield from values.items()
        return
    remaining = iter(values)
    for group in ("required", "optional"):
        has_upload = False
        for name, specification in inputs.get(group, {}).items():
            kind, *rest = specification
            options = rest[0] if rest else {}
            if not is_widget(kind) or options.get("forceInput"):
                continue
            try:
                value = next(remaining)
            except StopIteration:
                break
            yield name, value
            if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                next(remaining, None)
            has_upload |= any(options.get(upload) for upload in UPLOADS)
        if has_upload:
            next(remaining, None)


def is_widget(kind: Any) -> bool:
    """Whether the interface shows an input of this type as a widget."""
    return isinstance(kind, list) or kind in WIDGET_TYPES


def origin(link: int | None, nodes: Mapping[int, Any], links: Mapping[int, Any]) -> Any:
    """The [node id, output] that feeds a link, seen through bypassed nodes; None if cut."""
    while link is not None:
        _, source, slot, *_, kind = links[link]
        mode = nodes[source].get("mode", 0)
        if mode == MUTED:
            return None
        if mode != BYPASSED:
            return [str(source), slot]
        link = next(
            (
                socket["link"]
                for socket in nodes[source].get("inputs", [])
                if socket["type"] == kind and socket.get("link") is not None
            ),
            None,
        )
    return None
