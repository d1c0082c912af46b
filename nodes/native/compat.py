"""What differs between versions of ComfyUI, each asked in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.sd


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function of core has an argument of this name."""
    return argument in inspect.signature(function).parameters


def is_dynamic(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether core moves the parts of a model to the GPU as they are needed (newer versions)."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def patcher_class(dynamic: bool) -> type[comfy.model_patcher.ModelPatcher]:
    """Core's own class of patchers: newer versions have one that may be dynamic."""
    plain = comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", plain) if dynamic else plain


def load_weights(patcher: comfy.model_patcher.ModelPatcher, state: dict[str, Any]) -> None:
    """Load the weights of a U-Net; a dynamic patcher keeps the tensors as they come."""
    load = patcher.model.load_model_weights
    load(state, **({"assign": is_dynamic(patcher)} if takes(load, "assign") else {}))


def make_clip(target: Any, weights: dict[str, Any], **arguments: Any) -> comfy.sd.CLIP:
    """A CLIP with its weights, which newer versions want to have at once."""
    if takes(comfy.sd.CLIP.__init__, "state_dict"):
        return comfy.sd.CLIP(target, state_dict=weights, **arguments)
    clip = comfy.sd.CLIP(target, **arguments)
    clip.load_sd(weights, full_model=True)
    return clip
