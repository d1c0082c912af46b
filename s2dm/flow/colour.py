"""Flow as colours: direction is hue, length is saturation, after the Middlebury benchmark."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from .field import FlowError, FlowField

# The wheel of Baker et al., "A Database and Evaluation Methodology for Optical Flow" (2011):
# hues stand further apart where the eye tells them apart less well. Its start is to the right.
_COLOURS = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0))
_STARTS = (0, 15, 21, 25, 36, 49, 55)


def flow_to_image(field: FlowField, max_magnitude: float | None = None) -> Tensor:
    """Colours of the displacement, (N,3,H,W) in [0,1].

    No motion is white. Right is red, down is yellow, left is blue-green and up is violet; since
    flow is backward, the colour says where a pixel came from. One scale holds for the whole
    clip, so that a video of it doesn't flicker: full colour is `max_magnitude` pixels, or else
    the longest displacement of the clip (at least one pixel, so that a still clip stays white).
    Longer displacements are drawn darker.
    """
    magnitude = field.magnitude()
    if max_magnitude is None:
        max_magnitude = max(magnitude.max().item(), 1.0)
    elif not max_magnitude > 0:
        raise FlowError(
            f"max_magnitude: expected a number above 0, in pixels, got {max_magnitude}."
        )
    length = magnitude / max_magnitude

    x, y = field.displacement[:, 0], field.displacement[:, 1]
    hue = _wheel(torch.atan2(y, x) / (2 * pi) % 1.0)
    return torch.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue).clamp(0, 1)


def _wheel(turn: Tensor) -> Tensor:
    """(N,H,W) fractions of a turn to (N,3,H,W) pure colours."""
    starts = turn.new_tensor(_STARTS) / _STARTS[-1]
    colours = turn.new_tensor(_COLOURS)
    arc = (torch.bucketize(turn, starts, right=True) - 1).clamp(0, len(_STARTS) - 2)
    share = ((turn - starts[arc]) / (starts[arc + 1] - starts[arc])).unsqueeze(-1)
    return colours[arc].lerp(colours[arc + 1], share).movedim(-1, 1)
