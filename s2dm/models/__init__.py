"""Flow adapter, configurations, key maps, tokenizer and checkpoint format.

``build`` needs diffusers and transformers and is imported by name.
"""

from .adapter import FlowAdapter, fuse_attention
from .config import (
    FORMAT_VERSION,
    FUSIONS,
    ConfigError,
    FlowAdapterConfig,
    S2DMConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from .presets import PUPPETS, SD15

__all__ = [
    "FORMAT_VERSION",
    "FUSIONS",
    "PUPPETS",
    "SD15",
    "ConfigError",
    "FlowAdapter",
    "FlowAdapterConfig",
    "S2DMConfig",
    "ScheduleConfig",
    "TextEncoderConfig",
    "UNetConfig",
    "VAEConfig",
    "fuse_attention",
]
