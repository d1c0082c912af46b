"""Core's nodes that patch a MODEL, called alike in all versions of ComfyUI."""

from __future__ import annotations

import inspect
from typing import Any

import pytest


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
