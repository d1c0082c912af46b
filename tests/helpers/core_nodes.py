"""Core's nodes that patch a MODEL, called alike in all versions of ComfyUI."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

THINNING = [
    ("nodes_tomesd", "TomePatchModel", {"ratio": 0.5}),
    (
        "nodes_hypertile",
        "HyperTile",
        {"tile_size": 32, "swap_size": 4, "max_depth": 3, "scale_depth": False},
    ),
]
"""Core's nodes that thin out self-attention and draw random numbers in each call: for `core_node`,
module, name and settings."""


def core_node(module: str, name: str, model: Any, **settings: Any) -> Any:
    """MODEL of a node of core, whose classes newer versions write in another way."""
    node = getattr(pytest.importorskip(f"comfy_extras.{module}"), name)
    call = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    made = call(model, **settings)
    return getattr(made, "args", made)[0]


def windowed(model: Any, **changes: Any) -> Any:
    """MODEL in context windows of four frames."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    settings = {
        "context_length": 4,
        "context_overlap": 2,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 0,
        "freenoise": False,
        **changes,
    }
    known = inspect.signature(ContextWindowsManualNode.execute).parameters
    settings = {name: value for name, value in settings.items() if name in known}
    return ContextWindowsManualNode.execute(model, **settings).args[0]
