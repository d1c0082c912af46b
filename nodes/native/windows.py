"""Core's context windows over the frames of a clip: refused where they would mix up the flows."""

from __future__ import annotations

from copy import copy
from itertools import cycle
from typing import Any

import comfy.conds
import torch
from torch import Tensor

_PROBE = "s2dm_frame"
"""Key of the frames' numbers in the conditions that a handler is tried with."""


class ContextWindowsError(ValueError):
    """Context windows that don't show each frame its own flow."""


def check_context_windows(guider: Any, num_frames: int) -> None:
    """Refuse context windows over frames that don't show each frame its own flow.

    Told by trying: the handler is given the frames' numbers as latents and as their condition.
    """
    handler = guider.model_options.get("context_handler")
    if handler is None or getattr(handler, "dim", None) != 0:
        return
    if num_frames <= handler.context_length:
        return
    numbers = torch.arange(num_frames, dtype=torch.float32)
    wrong = []

    def call(model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Any) -> list[Tensor]:
        rows = conds[0][0]["model_conds"][_PROBE].cond.flatten().tolist()
        # As core fits conditions to the latents: cut short or repeated.
        for frame, row in zip(x.flatten().tolist(), cycle(rows), strict=False):
            if frame != row:
                wrong.append(f"frame {frame + 1:g} would see the flow of frame {row + 1:g}")
        return [x]

    try:
        # A copy, because core keeps the model and the step on its handler.
        copy(handler).execute(
            call,
            guider.model_patcher.model,
            [[{"model_conds": {_PROBE: comfy.conds.CONDRegular(numbers[:, None])}}]],
            numbers.view(-1, 1, 1, 1),
            torch.ones(num_frames),
            {"transformer_options": {"sample_sigmas": torch.ones(1)}},
        )
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        wrong.append(f"ComfyUI fails on them ({type(error).__name__}: {error})")
    if wrong:
        raise ContextWindowsError(
            f"S2DM: expected context windows that give each frame its own flow, but {wrong[0]}. "
            "Remove the Context Windows node, because S2DM samples clips of any length in chunks; "
            "or empty its retain lists and update ComfyUI."
        )
