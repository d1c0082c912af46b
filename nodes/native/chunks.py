"""Frames in chunks: frames don't see one another, so the U-Net may see a few at a time.

The result is the same to rounding, and peak memory doesn't grow with the length of the clip.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

log = logging.getLogger(__name__)

LEAST_FRAMES = 8
"""Frames for which core is asked to free memory, if the user doesn't say how many."""
_SHARE_OF_FREE_MEMORY = 0.7
_PIXELS_AT_ONCE_ON_CPU = 8192
"""Latent pixels of a chunk on the CPU. Larger ones leave the caches and are slower."""


def frames_at_once(
    model: Any, latents: Tensor, conditions: int, memory_required: Callable[[list[int]], float]
) -> int:
    """How many frames the U-Net should see at a time, from the memory that is free.

    Args:
        model: core's BaseModel.
        latents: (conditions * N, C, h, w), the whole call.
        conditions: how many conditions core has put into the call side by side.
        memory_required: core's estimate in bytes for an input of some shape.
    """
    frames = latents.shape[0] // conditions
    device = latents.device
    if device.type == "cpu":
        pixels = conditions * latents.shape[-1] * latents.shape[-2]
        return min(frames, max(1, _PIXELS_AT_ONCE_ON_CPU // pixels))
    one = memory_required([conditions, *latents.shape[1:]])
    free = comfy.model_management.get_free_memory(device) * _SHARE_OF_FREE_MEMORY
    return min(frames, max(1, int(free / max(one, 1))))


def in_chunks(
    call: Callable[..., Tensor],
    size: int,
    conditions: int,
    latents: Tensor,
    arguments: dict[str, Any],
) -> Tensor:
    """Call the U-Net on `size` frames at a time and put the results together.

    A chunk that doesn't fit into memory is halved and tried again.

    Args:
        call: takes `latents` and the arguments, gives (B, C, h, w).
        size: frames of a chunk.
        conditions: the batch is this many times all frames, one after the other.
        latents: (conditions * N, C, h, w).
        arguments: everything else. Tensors of the batch's length, also inside lists and
            dictionaries (ControlNet), are cut like the latents.
    """
    batch = latents.shape[0]
    frames = batch // conditions
    size = min(size, frames)
    if size == frames:
        out = _attempt(call, latents, arguments, last=frames == 1)
        if out is not None:
            return out
        size = _halved(size)
    out = None
    start = 0
    while start < frames:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows = _rows(start, min(start + size, frames), frames, conditions, latents.device)
        cut = {name: _cut(value, rows, batch) for name, value in arguments.items()}
        part = _attempt(call, latents[rows], cut, last=size == 1)
        if part is None:
            size = _halved(size)
            continue
        if out is None:
            out = part.new_empty((batch, *part.shape[1:]))
        out[rows] = part
        start += len(rows) // conditions
    return out


def _attempt(
    call: Callable[..., Tensor], latents: Tensor, arguments: dict[str, Any], last: bool
) -> Tensor | None:
    """The call's result, or None if it didn't fit into memory and isn't the last chance."""
    try:
        return call(latents, **arguments)
    except comfy.model_management.OOM_EXCEPTION:
        if last:
            raise
    # Outside the except block, because the exception holds the tensors of the failed call.
    return None


def _halved(size: int) -> int:
    comfy.model_management.soft_empty_cache()
    log.warning("S2DM: out of memory with %d frames at once, trying %d.", size, size // 2)
    return size // 2


def _rows(start: int, stop: int, frames: int, conditions: int, device: torch.device) -> Tensor:
    first = torch.arange(start, stop, device=device)
    return torch.cat([first + condition * frames for condition in range(conditions)])


def _cut(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor):
        if value.ndim > 0 and value.shape[0] == batch:
            return value[rows.to(value.device)]
        return value
    if isinstance(value, list):
        return [_cut(item, rows, batch) for item in value]
    if isinstance(value, tuple):
        return tuple(_cut(item, rows, batch) for item in value)
    # Exact type, because classes derived from dict may mean more than their items.
    if type(value) is dict:
        return {key: _cut(item, rows, batch) for key, item in value.items()}
    return value
