"""Classifier-free guidance with separate null labels for text and flow."""

from __future__ import annotations

from torch import Tensor


def guide(
    unconditional: Tensor,
    conditional: Tensor,
    scale: float,
    flow_only: Tensor | None = None,
    flow_scale: float | None = None,
) -> Tensor:
    """Combine predictions under null and true labels.

    With two predictions, ε = ε(∅,∅) + s·(ε(y,c) − ε(∅,∅)): text and flow are guided together,
    as in the paper. With a third one, ε(y,∅), each label has its own scale:
    ε = ε(∅,∅) + s_y·(ε(y,∅) − ε(∅,∅)) + s·(ε(y,c) − ε(y,∅)), equal to the first form where
    s_y = s.

    Args:
        unconditional: ε(∅,∅), any shape. Zero flow is not the null label: it says "no motion".
        conditional: ε(y,c), same shape.
        scale: guidance scale s, 1 for the plain conditional prediction.
        flow_only: ε(y,∅), same shape; needed when `flow_scale` is given.
        flow_scale: guidance scale s_y of the flow.

    Raises:
        ValueError: only one of `flow_only` and `flow_scale` is given.
    """
    if flow_only is None and flow_scale is None:
        return unconditional + scale * (conditional - unconditional)
    if flow_only is None or flow_scale is None:
        raise ValueError(
            "A flow scale needs the prediction with flow and null text, and vice versa."
        )
    return (
        unconditional + flow_scale * (flow_only - unconditional) + scale * (conditional - flow_only)
    )
