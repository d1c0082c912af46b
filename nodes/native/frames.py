"""The calls of a model that draws each frame alone: a few frames at a time, equal ones once.

Whatever of ours needs it asks for it here, so that the frames of a call are cut once and what is
wrapped further in sees a chunk of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .chunks import (
    LEAST_FRAMES,
    ChunkSizes,
    about_chunk,
    in_chunks,
    needs_the_whole_clip,
    one_of_equal,
)
from .labels import settle_rows

KEY = "s2dm_frames"
"""Of our wrappers, of the chunk size among the attachments of a MODEL, of a run's `ChunkSizes` and
of the `FramesOfCall` in transformer options."""
_OURS = "s2dm_"
"""What the keys of our wrappers begin with."""


@dataclass(frozen=True)
class FramesOfCall:
    """Which frames a call of the model sees, beside what else of the same clip.

    frames: their places among those that core calls with: the clip, or a context window of it.
    conditions: the ids of the conditions that they are predicted for, side by side.
    """

    frames: range
    conditions: tuple[Any, ...]


def call_in_chunks(patched: comfy.model_patcher.ModelPatcher, chunk_size: int | None) -> None:
    """Let a MODEL's clone be called with a few frames at a time.

    Comes before the wrappers that are to run within a chunk: core runs them in this order.

    Args:
        patched: changed in place.
        chunk_size: frames at a time, 0 chooses from free memory; None keeps what is set.
    """
    if chunk_size is not None:
        patched.set_attachments(KEY, chunk_size)
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
        (WrappersMP.APPLY_MODEL, _apply_model),
    ):
        if not patched.get_wrappers(kind, KEY):
            patched.add_wrapper_with_key(kind, KEY, wrapper)


def _prepare_sampling(
    executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
) -> Any:
    """Ask core for the memory of one chunk, not of the whole clip."""
    shape = list(noise_shape)
    # A ControlNet sees the whole clip, and core counts no memory for it but this.
    needs = {name for entries in conds.values() for entry in entries for name in entry}
    options = model.model_options.get("transformer_options", {})
    if not needs & {"control", "gligen"} and not needs_the_whole_clip(options):
        shape[0] = min(shape[0], model.get_attachment(KEY) or LEAST_FRAMES)
    return executor(model, shape, conds, *args, **kwargs)


def _sampler_sample(
    executor: Any, guider: Any, sigmas: Any, extra_args: dict[str, Any], *args: Any, **kwargs: Any
) -> Tensor:
    """A run begins: its chunk sizes. Core made these options for this run alone."""
    options = extra_args["model_options"].setdefault("transformer_options", {})
    options[KEY] = ChunkSizes(guider.model_patcher.get_attachment(KEY) or 0)
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: dict[str, Any] | None = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Each call of the model."""
    options = transformer_options or {}
    model = executor.class_obj
    conditions = max(1, len(options.get("cond_or_uncond", ())))
    if x.shape[0] % conditions:
        conditions = 1
    num_frames = x.shape[0] // conditions
    ids = tuple(options.get("uuids", ()))
    sizes = options.get(KEY)
    if not isinstance(sizes, ChunkSizes):
        sizes = ChunkSizes()
    if needs_the_whole_clip(options):
        sizes = ChunkSizes(whole=True)

    def call(
        x: Tensor,
        frames: range,
        t: Tensor,
        c_concat: Tensor | None,
        c_crossattn: Tensor | None,
        control: dict[str, Any] | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        told = {**options, KEY: FramesOfCall(frames, ids)}
        told["sigmas"] = t[: len(t) // conditions]
        if len(frames) < num_frames:
            told |= about_chunk(options, frames, num_frames)
        return executor(x, t, c_concat, c_crossattn, control, told, **kwargs)

    arguments = {
        "t": t,
        "c_concat": c_concat,
        "c_crossattn": c_crossattn,
        "control": control,
        "kwargs": settle_rows(t, kwargs),
    }
    if control is None and not _shown_to_others(model, options):
        once = one_of_equal(call, conditions, x, arguments)
        if once is not None:
            return once
    return in_chunks(call, sizes, model, conditions, x, arguments)


def _shown_to_others(model: Any, options: dict[str, Any]) -> bool:
    """Whether somebody else takes part in the call, who may tell apart frames that are equal."""
    if options.get("patches") or options.get("patches_replace") or options.get("ad_params"):
        return True
    if getattr(model.current_patcher, "injections", None):
        return True
    wrappers = options.get("wrappers", {})
    return any(
        found and not str(key).startswith(_OURS)
        for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
        for key, found in wrappers.get(kind, {}).items()
    )
