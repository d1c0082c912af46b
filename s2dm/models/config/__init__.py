"""Sizes and settings of every part of a checkpoint, as frozen dataclasses.

The names follow the `ldm` code base of Stable Diffusion 1.x, because the file keeps its
keys. All configs turn into plain JSON (`to_dict`) and back (`from_dict`), which checks
names and values so that a broken file is refused in plain words.
"""

from .adapter import FUSIONS, AdapterTrainingConfig, FlowAdapterConfig
from .checkpoint import FORMAT_VERSION, S2DMConfig
from .networks import (
    LATENT_CELL,
    BertConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    whole_cells,
)
from .sampling import SamplingConfig, ScheduleConfig
from .stage1 import FlowGeneratorConfig, RegionMotionConfig

__all__ = [
    "FORMAT_VERSION",
    "FUSIONS",
    "LATENT_CELL",
    "AdapterTrainingConfig",
    "BertConfig",
    "FlowAdapterConfig",
    "FlowGeneratorConfig",
    "RegionMotionConfig",
    "S2DMConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TextEncoderConfig",
    "UNetConfig",
    "VAEConfig",
    "whole_cells",
]
