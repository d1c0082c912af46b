"""Frames in chunks: frames don't see one another, so the U-Net may see a few at a time.

The result is the same to rounding, and peak memory doesn't grow with the length of the clip.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any
from uuid import uuid5

import comfy.model_management
import torch
from torch import Tensor

log = logging.getLogger(__name__)

LEAST_FRAMES = 8
"""Frames for which core is asked to free memory, if the user doesn't say how many."""
_SHARE_OF_FREE_MEMORY = 0.7
_PIXELS_AT_ONCE_ON_CPU = 32768
"""Most latent pixels of a chunk on the CPU, where larger ones take memory and save no time: 16
frames of 256x256 with guidance. Smaller ones read the weights more often."""


class ChunkSizes:
    """How many frames the U-Net sees at a time in one run of sampling.

    Chosen once for each shape of a call: the memory that is free varies from step to step, and
    other sizes round differently. Lowered for the rest of the run when a chunk didn't fit.

    Args:
        frames: the user's choice; 0 chooses from free memory.
        whole: all frames at once, whatever else is asked for or fits.
    """

    def __init__(self, frames: int = 0, whole: bool = False) -> None:
        self._asked = frames
        self._whole = whole
        self._chosen: dict[tuple[int, ...], int] = {}

    def choose(self, model: Any, latents: Tensor, conditions: int) -> int:
        """For a call of core's BaseModel with latents (conditions * N, C, h, w)."""
        key = (conditions, *latents.shape)
        if key not in self._chosen:
            frames = latents.shape[0] // conditions
            if self._whole:
                return frames
            size = self._asked or frames_at_once(latents, conditions, model.memory_required)
            # Chunks of about the same size: a last one of a frame or two would waste a call.
            self._chosen[key] = ceil(frames / ceil(frames / min(size, frames)))
        return self._chosen[key]

    def may_halve(self, size: int) -> bool:
        return size > 1 and not self._whole

    def halve(self, latents: Tensor, conditions: int) -> int:
        """The half of what was chosen, from now on, because that was too much."""
        key = (conditions, *latents.shape)
        size = self._chosen[key]
        self._chosen[key] = size // 2
        comfy.model_management.soft_empty_cache()
        log.warning("S2DM: out of memory with %d frames at once, trying %d.", size, size // 2)
        return size // 2


def frames_at_once(
    latents: Tensor, conditions: int, memory_required: Callable[[list[int]], float]
) -> int:
    """How many frames the U-Net should see at a time, from the memory that is free.

    Args:
        latents: (conditions * N, C, h, w), the whole call.
        conditions: how many conditions core has put into the call side by side.
        memory_required: core's estimate in bytes for an input of some shape.
    """
    frames = latents.shape[0] // conditions
    device = latents.device
    if device.type == "cpu":
        pixels = conditions * latents.shape[-1] * latents.shape[-2]
        frames = min(frames, max(1, _PIXELS_AT_ONCE_ON_CPU // pixels))
    one = memory_required([conditions, *latents.shape[1:]])
    free = comfy.model_management.get_free_memory(device) * _SHARE_OF_FREE_MEMORY
    return min(frames, max(1, int(free / max(one, 1))))


def needs_the_whole_clip(options: dict[str, Any]) -> bool:
    """Whether a node of core looks at all frames of a call at once."""
    # GLIGEN has made its boxes for the whole batch.
    if "middle_patch" in options.get("patches", {}):
        return True
    # Self-Attention Guidance keeps the attention that it saw last in the middle block.
    return ("middle", 0, 0) in options.get("patches_replace", {}).get("attn1", {})


def about_chunk(options: dict[str, Any], frames: range, num_frames: int) -> dict[str, Any]:
    """What the transformer options of a chunk tell other nodes, in place of the clip's.

    By the ids of the conditions they keep what they saw in a step. By the numbers of the frames,
    given as AnimateDiff gives those of its windows, IPAdapter and others pick what they hold of
    each frame: images, weights, masks.
    """
    ids = [uuid5(one, f"{frames.start}:{frames.stop}") for one in options.get("uuids", ())]
    outer = options.get("ad_params") or {}
    if outer.get("sub_idxs") is None:
        numbers = {"sub_idxs": list(frames), "full_length": num_frames}
    else:
        numbers = {"sub_idxs": [outer["sub_idxs"][number] for number in frames]}
    return {"uuids": ids, "ad_params": {**outer, **numbers}}


def in_chunks(
    call: Callable[..., Tensor],
    sizes: ChunkSizes,
    model: Any,
    conditions: int,
    latents: Tensor,
    arguments: dict[str, Any],
) -> Tensor:
    """Call the U-Net on a few frames at a time and put the results together.

    A chunk that doesn't fit into memory is halved and tried again. What draws random numbers once
    in a call of the U-Net (ToMe, HyperTile) draws the same ones for each chunk.

    Args:
        call: takes `latents`, the `frames` that they are as a range, and the arguments; gives
            (B, C, h, w).
        sizes: of this run of sampling.
        model: core's BaseModel.
        conditions: the batch is this many times all frames, one after the other.
        latents: (conditions * N, C, h, w).
        arguments: everything else. Tensors of the batch's length, also inside lists and
            dictionaries (ControlNet), are cut like the latents.
    """
    batch = latents.shape[0]
    frames = batch // conditions
    size = sizes.choose(model, latents, conditions)
    out = None
    start = 0
    rewind = _rewind(latents.device)
    while start < frames:
        comfy.model_management.throw_exception_if_processing_interrupted()
        stop = min(start + size, frames)
        rows = _rows(start, stop, frames, conditions)
        # Also for all frames at once: core empties the lists of a ControlNet as it goes, and a
        # second attempt would find nothing in them.
        cut = {name: _cut(value, rows, batch) for name, value in arguments.items()}
        last = not sizes.may_halve(size)
        part = _attempt(call, _cut(latents, rows, batch), range(start, stop), cut, last)
        if part is None:
            size = sizes.halve(latents, conditions)
            rewind()
            continue
        if stop - start == frames:
            return part
        if out is None:
            out = part.new_empty((batch, *part.shape[1:]))
        for place, piece in zip(rows, part.chunk(conditions), strict=True):
            out[place] = piece
        start = stop
        if start < frames:
            rewind()
    return out


def one_of_equal(
    call: Callable[..., Tensor], conditions: int, latents: Tensor, arguments: dict[str, Any]
) -> Tensor | None:
    """Call the U-Net on frame 1 alone where all frames of each condition are equal.

    Takes the arguments of `in_chunks`. None: they aren't, or there is one frame.
    """
    batch = latents.shape[0]
    frames = batch // conditions
    # What is told apart most cheaply comes first.
    if frames < 2 or not all(_equal(value, conditions, batch) for value in (arguments, latents)):
        return None
    comfy.model_management.throw_exception_if_processing_interrupted()
    rows = _rows(0, 1, frames, conditions)
    cut = {name: _cut(value, rows, batch) for name, value in arguments.items()}
    return call(_cut(latents, rows, batch), range(1), **cut).repeat_interleave(frames, dim=0)


def _equal(value: Any, conditions: int, batch: int) -> bool:
    """Whether all frames of each condition have the same: see `_cut` for what frames have."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch or value.stride(0) == 0:
            return True
        rows = value.unflatten(0, (conditions, -1))
        return bool((rows == rows[:, :1]).all())
    if isinstance(value, (list, tuple)):
        return all(_equal(item, conditions, batch) for item in value)
    if type(value) is dict:
        return all(_equal(item, conditions, batch) for item in value.values())
    return True


def _rewind(device: torch.device) -> Callable[[], None]:
    """What brings torch's random numbers back to where they are now, on the CPU and with CUDA."""
    gpu = torch.cuda if device.type == "cuda" else None
    here, there = torch.get_rng_state(), gpu and gpu.get_rng_state(device)

    def rewind() -> None:
        torch.set_rng_state(here)
        if gpu is not None:
            gpu.set_rng_state(there, device)

    return rewind


def _attempt(
    call: Callable[..., Tensor],
    latents: Tensor,
    frames: range,
    arguments: dict[str, Any],
    last: bool,
) -> Tensor | None:
    """The call's result, or None if it didn't fit into memory and isn't the last chance."""
    try:
        return call(latents, frames=frames, **arguments)
    except RuntimeError as error:
        if last or not is_out_of_memory(error):
            raise
    # Outside the except block, because the exception holds the tensors of the failed call.
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    # Newer versions of core know errors that only say so by a code, and clear what such an
    # error leaves on the device.
    if getattr(comfy.model_management, "is_oom", lambda error: False)(error):
        return True
    # Not all devices have a class of their own for it.
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)


def _rows(start: int, stop: int, frames: int, conditions: int) -> list[slice]:
    """Where the frames are in the batch: once for each condition."""
    if stop - start == frames:
        return [slice(0, conditions * frames)]
    return [slice(c * frames + start, c * frames + stop) for c in range(conditions)]


def _cut(value: Any, rows: Sequence[slice], batch: int) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            return value
        pieces = [value[place] for place in rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if isinstance(value, list):
        return [_cut(item, rows, batch) for item in value]
    if isinstance(value, tuple):
        return tuple(_cut(item, rows, batch) for item in value)
    # Exact type, because classes derived from dict may mean more than their items.
    if type(value) is dict:
        return {key: _cut(item, rows, batch) for key, item in value.items()}
    return value
