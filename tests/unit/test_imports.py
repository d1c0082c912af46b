"""Which part of the house imports which: one way, in few layers."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 8
"""As CONTRIBUTING.md lists them, beside what they all stand on."""
FACES = {
    "s2dm.flow",
    "s2dm.sector",
    "s2dm.models",
    "s2dm.settings",
    "s2dm.video",
    "s2dm.data.prepared",
    "s2dm.training",
}
"""What nodes take from the library."""

Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    return {
        name_of(path): path for part in ("s2dm", "nodes") for path in ROOT.glob(f"{part}/**/*.py")
    }


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours and others that a file imports, in functions too, but not for types alone."""
    tree = ast.parse(path.read_text("utf-8"))
    types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    here = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*above, *((node.module or "").split(".") if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                yield inside if inside in known else base


@functools.cache
def graph() -> Graph:
    known = modules()
    return {name: {one for one in imported(path, known)} for name, path in known.items()}


def room(name: str) -> str:
    """The package of the library that a module is in, or the module where it is in none."""
    return ".".join(name.split(".")[:2])


def between_rooms() -> Graph:
    found: Graph = {}
    for name, others in graph().items():
        ours = {room(other) for other in others if other.startswith("s2dm.")}
        if name.startswith("s2dm."):
            found.setdefault(room(name), set()).update(ours - {room(name)})
    return found


def depth(rooms: Graph, name: str) -> int:
    return 1 + max((depth(rooms, other) for other in rooms.get(name, ())), default=0)


def test_no_module_is_imported_by_what_it_imports():
    ours = {name: others & set(graph()) for name, others in graph().items()}
    order = list(TopologicalSorter(ours).static_order())  # CycleError names a circle
    assert len(order) == len(ours) > 150


def test_the_library_has_few_layers_without_a_circle():
    rooms = between_rooms()
    list(TopologicalSorter(rooms).static_order())
    assert max(depth(rooms, name) for name in rooms) <= LAYERS


def test_the_library_knows_nothing_of_its_faces():
    for name, others in graph().items():
        tops = {other.split(".")[0] for other in others}
        if name.startswith("s2dm"):
            assert not tops & {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"}, name


def test_nodes_take_of_the_library_what_is_for_them():
    for name, others in graph().items():
        if name.startswith("nodes"):
            for other in others:
                allowed = not other.startswith("s2dm.") or any(
                    other == face or other.startswith(face + ".") for face in FACES
                )
                assert allowed, f"{name} imports {other}"
