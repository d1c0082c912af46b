"""What core's save nodes write of a MODEL with a flow adapter: a file that loads again.

Core asks the configuration of a model how to name its weights when it saves them. Ours, an
ordinary object patch, adds the adapter and what the file says about itself, so that Save
Checkpoint makes a checkpoint of ours, merged LoRAs and all. Where it can't, it says so.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import NamedTuple

import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy.model_base import ModelType
from torch import Tensor, nn

from ...s2dm.models import PARTS, STAGE_1, S2DMConfig, ScheduleConfig
from ...s2dm.models.checkpoint import CONFIG_TENSOR
from ...s2dm.models.presets import SD15
from ...s2dm.settings import SettingsError
from .wrappers import held_adapter

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

PREDICTIONS = {ModelType.EPS: "epsilon", ModelType.V_PREDICTION: "v_prediction"}
"""What models predict, in the words of a `ScheduleConfig`, by core's names for it."""
_PARTS = ("unet", "text_encoder", "vae")
_CONFIG = "model_config"
"""Where core keeps the configuration of a model."""


class SavingError(ValueError):
    """A model that would be saved into a file that nothing can load."""


class _Kept(NamedTuple):
    """What is saved besides core's weights.

    core: the configuration of the model as core made it.
    config: of a file with all parts.
    adapter, strength: its weights, and how strongly they act.
    stage1: the networks of stage 1 by their parts, if the checkpoint held it.
    """

    core: comfy.supported_models_base.BASE
    config: S2DMConfig
    adapter: nn.Module
    strength: float
    stage1: Mapping[str, nn.Module]


class _Keeping:
    """Over the class of a model's configuration: it saves the adapter too."""

    kept: _Kept

    def __init__(self, kept: _Kept) -> None:
        vars(self).update(vars(kept.core))
        self.kept = kept
        self.beside: State = {}  # text encoder and VAE, which core hands over before the U-Net

    def process_clip_state_dict_for_saving(self, state_dict: State) -> State:
        self.beside = super().process_clip_state_dict_for_saving(state_dict)
        return dict(self.beside)

    def process_vae_state_dict_for_saving(self, state_dict: State) -> State:
        weights = super().process_vae_state_dict_for_saving(state_dict)
        self.beside = {**self.beside, **weights}
        return weights

    def process_unet_state_dict_for_saving(self, state_dict: State) -> State:
        weights = super().process_unet_state_dict_for_saving(state_dict)
        beside, self.beside = self.beside, {}
        return {**weights, **_additions(self.kept, {**weights, **beside})}


def keep_when_saving(
    patched: comfy.model_patcher.ModelPatcher,
    config: S2DMConfig,
    strength: float = 1.0,
    stage1: Mapping[str, nn.Module] | None = None,
) -> None:
    """Let core's save nodes write the adapter of a MODEL along with it.

    Args:
        patched: a clone with the adapter on it; changed in place.
        config: of the file that the MODEL comes from, or of the adapter alone if it is another.
        strength: of the adapter; the saved one acts as strongly at strength 1.
        stage1: its networks by their parts, where the file held it.
    """
    core = patched.get_model_object(_CONFIG)
    if isinstance(core, _Keeping):  # another adapter on a model of ours
        kept = core.kept
        core, stage1 = kept.core, kept.stage1
        config = dataclasses.replace(kept.config, flow_adapter=config.flow_adapter)
    elif config.unet is None:
        config = _with_stable_diffusion(config, patched.model.model_type)
    kept = _Kept(core, config, held_adapter(patched), strength, stage1 or {})
    kind = type(f"Keeping{type(core).__name__}", (_Keeping, type(core)), {})
    patched.add_object_patch(_CONFIG, kind(kept))


def _with_stable_diffusion(config: S2DMConfig, model_type: ModelType) -> S2DMConfig:
    """The config of an adapter on Stable Diffusion 1.x, if that is what it was made for."""
    try:
        return dataclasses.replace(
            config,
            unet=SD15.unet,
            text_encoder=SD15.text_encoder,
            vae=SD15.vae,
            tokenizer=SD15.tokenizer,
            schedule=ScheduleConfig(prediction_type=PREDICTIONS[model_type]),
        )
    except (SettingsError, KeyError):
        return config


def _additions(kept: _Kept, weights: State) -> State:
    """The adapter's weights and the config, for the parts that are among core's weights."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    there = {part for part in _PARTS if any(n.startswith(PARTS[part].prefix) for n in shapes)}
    other = {part for part in there if not _fits(kept.config, part, shapes)}
    config = kept.config
    # No other loader than ours knows a U-Net of another size.
    ours_alone = config.unet not in (None, SD15.unet)
    if ours_alone and (other or there != set(_PARTS)):
        wrong = ", ".join(other or set(_PARTS) - there).replace("_", " ")
        raise SavingError(
            "S2DM: not saved, because no node could load the file: expected the U-Net, text "
            f"encoder and VAE of the checkpoint, {'got another' if other else 'got no'} {wrong}. "
            "Use Save Checkpoint with model, clip and vae of Load Checkpoint (S2DM)."
        )
    if other:
        logger.warning(
            "S2DM: the %s is not that of Stable Diffusion 1.x. The saved file keeps the flow "
            "adapter: load the file with the ordinary loader, then with Apply Flow Adapter (S2DM).",
            ", ".join(sorted(other)).replace("_", " "),
        )
        config = config.adapter_only()
    else:
        config = dataclasses.replace(config, **dict.fromkeys(set(_PARTS) - there))
        if there != set(_PARTS):
            alone = dict.fromkeys(("tokenizer", "flow_tokenizer", *STAGE_1))
            config = dataclasses.replace(config, **alone)
        logger.info(
            "S2DM: the saved file keeps the flow adapter. The loaders of S2DM list files in "
            "models/s2dm and output/s2dm; a file name s2dm/NAME saves to the latter."
        )
    added = _of_part("flow_adapter", kept.adapter)
    for name in added:
        if name.endswith((".to_k.weight", ".to_v.weight", ".to_add.weight")):
            added[name] = added[name] * kept.strength
    for part in STAGE_1:
        if getattr(config, part) is not None and part in kept.stage1:
            added |= _of_part(part, kept.stage1[part])
        else:
            config = dataclasses.replace(config, **{part: None})
    text = bytearray(json.dumps(config.to_dict()).encode())
    return {**added, CONFIG_TENSOR: torch.frombuffer(text, dtype=torch.uint8)}


def _fits(config: S2DMConfig, part: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether weights of these names and shapes hold the part as the config describes it."""
    if getattr(config, part) is None:
        return False
    prefix, keys = PARTS[part]
    table = keys(getattr(config, part))
    return all(shapes.get(prefix + key.ldm) == key.ldm_shape for key in table)


def _of_part(part: str, network: nn.Module) -> State:
    prefix = PARTS[part].prefix
    return {prefix + name: weight for name, weight in network.state_dict().items()}
