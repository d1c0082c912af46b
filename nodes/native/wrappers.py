"""What a flow adapter does around the stages of core's sampling."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
from torch import Tensor

from ...s2dm.models import FlowAdapter
from .attention import with_flow
from .labels import TABLES, attach_labels, encode_labels, remove_labels, tokens_of_call
from .parts import check_parts
from .recommended import recommended, resolve_labels
from .windows import check_context_windows

KEY = "s2dm_flow_adapter"
"""Under this key a patched MODEL holds the adapter's weights and our wrappers."""


def held_adapter(patcher: comfy.model_patcher.ModelPatcher) -> FlowAdapter | None:
    """The adapter that a MODEL holds, if any."""
    held = patcher.get_additional_models_with_key(KEY)
    return held[0].model if held else None


class Wrappers:
    """What happens around the stages of core's sampling, in the order of its methods."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Before anything is loaded: move the flow labels to where core batches conditions."""
        guider = executor.class_obj
        check_parts(guider.model_patcher, guider.conds, noise)
        sampling = recommended(guider.model_patcher)
        resolve_labels(guider.conds, sampling, getattr(guider, "cfg", None))
        attach_labels(guider.conds, noise.shape[0])
        check_context_windows(guider, len(noise))
        return executor(noise, *args, **kwargs)

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
        patcher, told = guider.model_patcher, dict(guider.conds)
        by_adapter = {held_adapter(patcher): told}
        # Core's Dual Model guider keeps a second model, and what that one is told, to itself.
        if second := getattr(guider, "_uncond_conds", None):
            other = held_adapter(guider.uncond_model_patcher)
            if other is None:
                remove_labels({"second": second})
            else:
                by_adapter.setdefault(other, {})["second"] = second
        tables = {
            adapter: encode_labels(conditions, adapter, patcher.model, noise)
            for adapter, conditions in by_adapter.items()
        }
        # Core made these options for this run alone.
        options = extra_args["model_options"].setdefault("transformer_options", {})
        options[TABLES] = tables
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
        """Each call of the U-Net, with a chunk of the frames: show it the flow."""
        options = transformer_options or {}
        adapter = held_adapter(executor.class_obj.current_patcher)
        if adapter is not None:  # not the second model of a guider
            size = tuple(x.shape[-2:])
            tokens, mask, kwargs = tokens_of_call(adapter, options, t, size, kwargs)
            options = with_flow(options, adapter, self.strength, tokens, size, mask)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
