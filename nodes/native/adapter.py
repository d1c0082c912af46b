"""The flow adapter on a MODEL: checks, wrappers and the adapter's weights under core's care."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import cycle
from typing import Any
from uuid import UUID, uuid5

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...s2dm.models import FlowAdapter, FlowAdapterConfig, SamplingConfig
from .attention import cross_attention_layers, with_flow
from .chunks import LEAST_FRAMES, ChunkSizes, in_chunks
from .labels import MASK, ROW, TABLES, WINDOW, attach_labels, encode_labels, remove_labels
from .recommended import recommend, recommended, resolve_labels

KEY = "s2dm_flow_adapter"
"""Under this key a patched MODEL holds the adapter's weights and our wrappers."""
_CHUNKS = "s2dm_chunks"
"""Key of the run's `ChunkSizes` in its transformer options."""


class AdapterError(ValueError):
    """An adapter and a model that don't fit each other, or a model that can't be used so."""


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher,
    config: FlowAdapterConfig,
    state: dict[str, Tensor],
    strength: float = 1.0,
    frames: int = 0,
    sampling: SamplingConfig | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL that follows flow. The model itself stays as it is.

    Args:
        model: any MODEL with the U-Net of Stable Diffusion 1.x. An adapter that it may hold
            already is replaced.
        config, state: the adapter, as `load_checkpoint` gives it.
        strength: multiplies the flow's keys and values; 0 is the model without flow.
        frames: frames that the U-Net sees at a time; 0 chooses from free memory.
        sampling: how the adapter's checkpoint recommends to sample; the paper's settings if None.

    Raises:
        AdapterError: the model isn't built as the adapter needs it.
    """
    _check_layers(model.get_model_object("diffusion_model"), config)
    patched = model.clone()
    # Layers of the adapter cast their weights at use, like those of the model.
    dtype = patched.model.manual_cast_dtype or patched.model.get_dtype()
    place = (config, state, dtype, patched.load_device, patched.offload_device)
    weights = _weights(*place)
    # Newer versions of core make copies for further GPUs in this way.
    weights.cached_patcher_init = (_weights, place)
    patched.set_additional_models(KEY, [weights])
    recommend(patched, sampling or SamplingConfig())
    wrappers = _Wrappers(strength, frames)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
        (WrappersMP.PREPARE_SAMPLING, wrappers.prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, wrappers.sampler_sample),
        (WrappersMP.APPLY_MODEL, wrappers.apply_model),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def _weights(
    config: FlowAdapterConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = True,
) -> comfy.model_patcher.ModelPatcher:
    adapter = FlowAdapter(config, comfy.ops.manual_cast, offload_device, dtype)
    adapter.load_state_dict(state)
    adapter.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(adapter, load_device, offload_device)


def _check_layers(unet: torch.nn.Module, config: FlowAdapterConfig) -> None:
    there = cross_attention_layers(unet)
    if not there:
        raise AdapterError(
            "expected a MODEL with the U-Net of Stable Diffusion 1.x, got "
            f"{type(unet).__name__}, which has no such cross-attention layers. Load a Stable "
            "Diffusion 1.5 checkpoint."
        )
    wanted = dict(config.layers)
    wrong = [
        f"{name} is {there.get(name, 'missing')} (expected {width})"
        for name, width in wanted.items()
        if there.get(name) != width
    ]
    if wrong:
        raise AdapterError(
            f"the adapter was made for another U-Net: of its {len(wanted)} cross-attention "
            f"layers, {len(wrong)} don't fit the MODEL, which has {len(there)}; "
            f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}. Use the adapter with the "
            "kind of model that it was trained for (Stable Diffusion 1.5 has widths 320, 640 "
            "and 1280)."
        )


class _Wrappers:
    """What happens around the stages of core's sampling, in the order of its methods."""

    def __init__(self, strength: float, frames: int) -> None:
        self.strength = strength
        self.frames = frames

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Before anything is loaded: move the flow labels to where core batches conditions."""
        guider = executor.class_obj
        sampling = recommended(guider.model_patcher)
        resolve_labels(guider.conds, sampling, getattr(guider, "cfg", None))
        attach_labels(guider.conds, noise.shape[0])
        _check_context_windows(guider, noise)
        return executor(noise, *args, **kwargs)

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Ask core for the memory of one chunk, not of the whole clip."""
        shape = list(noise_shape)
        # A ControlNet sees the whole clip, and core counts no memory for it but this.
        needs = {name for entries in conds.values() for entry in entries for name in entry}
        options = model.model_options.get("transformer_options", {})
        if not needs & {"control", "gligen"} and not _needs_the_whole_clip(options):
            shape[0] = min(shape[0], self.frames or LEAST_FRAMES)
        return executor(model, shape, conds, *args, **kwargs)

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The weights are loaded and the conditions final: encode the flow, once a run."""
        patcher = guider.model_patcher
        model = patcher.model
        place = {
            "device": noise.device,
            "dtype": model.manual_cast_dtype or model.get_dtype(),
        }
        conditions = {_adapter(patcher): dict(guider.conds)}
        # Core's Dual Model guider keeps a second model, and what that one is told, to itself.
        if second := getattr(guider, "_uncond_conds", None):
            other = _adapter(guider.uncond_model_patcher)
            if other is None:
                remove_labels({"second": second})
            else:
                conditions.setdefault(other, {})["second"] = second
        tables = {
            adapter: encode_labels(told, adapter, model.model_sampling, noise.shape[-2:], 8, place)
            for adapter, told in conditions.items()
        }
        # Core made these options for this run alone.
        options = extra_args["model_options"].setdefault("transformer_options", {})
        options |= {TABLES: tables, _CHUNKS: ChunkSizes(self.frames)}
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Each call of the U-Net: show it the flow, a few frames at a time."""
        options = transformer_options or {}
        model = executor.class_obj
        adapter = _adapter(model.current_patcher)
        if adapter is None:  # the second model of a guider
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        conditions = max(1, len(options.get("cond_or_uncond", ())))
        if x.shape[0] % conditions:
            conditions = 1
        clip = x.shape[0] // conditions
        sizes = options.get(_CHUNKS) or ChunkSizes(self.frames)
        if _needs_the_whole_clip(options):
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
            kwargs = dict(kwargs)
            tokens, mask = _tokens_now(adapter, _table(adapter, options), t, kwargs)
            flow = with_flow(options, adapter, self.strength, tokens, mask)
            flow["sigmas"] = t[: len(t) // conditions]
            if len(frames) < clip:
                flow["uuids"] = _ids(options.get("uuids", ()), frames)
                flow["ad_params"] = _frame_numbers(options.get("ad_params"), frames, clip)
            return executor(x, t, c_concat, c_crossattn, control, flow, **kwargs)

        arguments = {
            "t": t,
            "c_concat": c_concat,
            "c_crossattn": c_crossattn,
            "control": control,
            "kwargs": kwargs,
        }
        return in_chunks(call, sizes, model, conditions, x, arguments)


def _needs_the_whole_clip(options: dict[str, Any]) -> bool:
    """Whether a node of core looks at all frames of a call at once."""
    # GLIGEN has made its boxes for the whole batch.
    if "middle_patch" in options.get("patches", {}):
        return True
    # Self-Attention Guidance keeps the attention that it saw last in the middle block.
    return ("middle", 0, 0) in options.get("patches_replace", {}).get("attn1", {})


def _adapter(patcher: comfy.model_patcher.ModelPatcher) -> FlowAdapter | None:
    held = patcher.get_additional_models_with_key(KEY)
    return held[0].model if held else None


def _table(adapter: FlowAdapter, options: dict[str, Any]) -> Tensor | None:
    """The tokens of a run that an adapter made, or that the one made which it is a copy of."""
    tables = options.get(TABLES, {})
    # On a further GPU the model and its adapter are copies.
    return tables.get(adapter, next(iter(tables.values()), None))


def _ids(ids: Sequence[UUID], frames: range) -> list[UUID]:
    """Ids of the conditions in a chunk: other nodes keep by them what they saw in a step."""
    return [uuid5(one, f"{frames.start}:{frames.stop}") for one in ids]


def _frame_numbers(outer: dict[str, Any] | None, frames: range, clip: int) -> dict[str, Any]:
    """Which frames of the clip a chunk has, as AnimateDiff says it of its windows.

    By this IPAdapter and others pick what they hold of each frame: images, weights, masks.
    """
    if outer is None or outer.get("sub_idxs") is None:
        return {**(outer or {}), "sub_idxs": list(frames), "full_length": clip}
    return {**outer, "sub_idxs": [outer["sub_idxs"][number] for number in frames]}


def _tokens_now(
    adapter: FlowAdapter, table: Tensor | None, t: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Take our conditions out of the call's: tokens at this sigma, (B, tokens, width), and mask."""
    row, window, mask = (kwargs.pop(name, None) for name in (ROW, WINDOW, MASK))
    if row is None or table is None:
        return adapter.null_tokens(1).to(t.device).expand(len(t), -1, -1), None
    inside = (t <= window[:, 0]) & (t >= window[:, 1])
    # Row 0 is the null label. Another GPU may run a part of the conditions.
    return table.to(t.device)[torch.where(inside, row[:, 0], 0)], mask


def _check_context_windows(guider: Any, noise: Tensor) -> None:
    """Refuse context windows over frames that don't show each frame its own flow.

    Told by trying: the handler is given the frames' numbers as latents and as their condition.
    """
    handler = guider.model_options.get("context_handler")
    if handler is None or getattr(handler, "dim", None) != 0:
        return
    frames = noise.shape[0]
    if frames <= handler.context_length:
        return
    numbers = torch.arange(frames, dtype=torch.float32)
    wrong = []

    def call(model: Any, conds: Any, x: Tensor, timestep: Tensor, options: Any) -> list[Tensor]:
        rows = conds[0][0]["model_conds"][ROW].cond.flatten().tolist()
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
            [[{"model_conds": {ROW: comfy.conds.CONDRegular(numbers[:, None])}}]],
            numbers.view(-1, 1, 1, 1),
            torch.ones(frames),
            {"transformer_options": {"sample_sigmas": torch.ones(1)}},
        )
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        wrong.append(f"ComfyUI fails on them ({type(error).__name__}: {error})")
    if wrong:
        raise AdapterError(
            f"S2DM: these context windows don't show each frame its own flow: {wrong[0]}. Frames "
            "of S2DM don't need windows, they are sampled in chunks of any length: remove the "
            "Context Windows node, or empty its retain lists and update ComfyUI."
        )
