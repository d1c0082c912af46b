"""The flow adapter on a MODEL: does it fit, and its weights under core's care."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_sampling import EPS, V_PREDICTION
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...s2dm.models import FlowAdapter, FlowAdapterConfig, SamplingConfig, ScheduleConfig
from .attention import cross_attention_layers, cross_attention_levels
from .frames import call_in_chunks
from .recommended import recommend
from .wrappers import KEY, Wrappers

logger = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An adapter and a model that don't fit each other, or a model that can't be used so."""


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher,
    config: FlowAdapterConfig,
    state: dict[str, Tensor],
    strength: float = 1.0,
    chunk_size: int = 0,
    sampling: SamplingConfig | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL that follows flow. The model itself stays as it is.

    Args:
        model: any MODEL with the U-Net of Stable Diffusion (1.x, 2.x, SDXL) that the adapter was
            made for. An adapter that it may hold already is replaced.
        config, state: the adapter, as `load_checkpoint` gives it.
        strength: multiplies what the layers get of the flow; 0 is the model without flow.
        chunk_size: frames that the U-Net sees at a time; 0 chooses from free memory.
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
    call_in_chunks(patched, chunk_size)
    wrappers = Wrappers(strength)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
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


def prediction_of(model: comfy.model_patcher.ModelPatcher) -> str | None:
    """What a MODEL predicts, in the words of a `ScheduleConfig`; None for what has no word there.

    By how it is sampled: core's ModelSamplingDiscrete makes a MODEL one of v-prediction, and
    leaves the kind that it was loaded as.
    """
    guess = type(model.get_model_object("model_sampling")).calculate_denoised
    kinds = {"epsilon": EPS, "v_prediction": V_PREDICTION}
    return next((name for name, kind in kinds.items() if kind.calculate_denoised is guess), None)


def tell_other_prediction(
    model: comfy.model_patcher.ModelPatcher, schedule: ScheduleConfig
) -> None:
    """Warn where a MODEL predicts something else than the one that its adapter was trained on."""
    found = prediction_of(model)
    if found is not None and found != schedule.prediction_type:
        logger.warning(
            "S2DM: the adapter was trained on a model that predicts %s, and the MODEL predicts %s: "
            "it may follow the flow badly. Use it with the kind of model that it was trained for.",
            schedule.prediction_type,
            found,
        )


def adapter_config_for(
    model: comfy.model_patcher.ModelPatcher, fusion: str = "channel", **settings: Any
) -> FlowAdapterConfig:
    """The config of a new adapter for all cross-attention layers of a MODEL.

    Raises:
        AdapterError: the MODEL isn't built as an adapter needs it.
    """
    unet = model.get_model_object("diffusion_model")
    layers = _layers_of(unet)
    levels = cross_attention_levels(unet)
    return FlowAdapterConfig(fusion=fusion, layers=tuple(layers.items()), levels=levels, **settings)


def _layers_of(unet: torch.nn.Module) -> dict[str, int]:
    """The cross-attention layers that an adapter may enter, with their widths.

    Raises:
        AdapterError: there are none, or they belong to a model of videos.
    """
    layers = cross_attention_layers(unet)
    if not layers:
        raise AdapterError(
            "expected a MODEL with the U-Net of Stable Diffusion (1.x, 2.x, SDXL), got "
            f"{type(unet).__name__}, which has no such cross-attention layers. Load a checkpoint "
            "of that kind, such as Stable Diffusion 1.5."
        )
    if any(hasattr(module, "time_stack") for module in unet.modules()):
        raise AdapterError(
            "expected a MODEL that draws each frame by itself, got one whose frames see one "
            "another (Stable Video Diffusion). It moves by itself: load a model of images, such "
            "as Stable Diffusion 1.5."
        )
    return layers


def _check_layers(unet: torch.nn.Module, config: FlowAdapterConfig) -> None:
    there, wanted = _layers_of(unet), dict(config.layers)
    wrong = [
        f"{name} is {there.get(name, 'missing')} (expected {width})"
        for name, width in wanted.items()
        if there.get(name) != width
    ]
    if wrong:
        raise AdapterError(
            f"the adapter was made for another U-Net: {len(wrong)} of its {len(wanted)} "
            f"cross-attention layers don't fit the MODEL, which has {len(there)}: "
            f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}. Use the adapter with the "
            "kind of model that it was trained for (Stable Diffusion 1.5 has widths 320, 640 "
            "and 1280)."
        )
    levels = cross_attention_levels(unet)
    if config.spatial and not set(levels) <= set(config.levels):
        raise AdapterError(
            f"the adapter was made for another U-Net: it has features for the levels "
            f"{list(config.levels)}, the MODEL's layers are at {list(levels)}. Use the adapter "
            "with the kind of model that it was trained for."
        )
