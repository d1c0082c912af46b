"""Flow adapter, configurations, key maps, tokenizer and checkpoint format.

``build`` needs diffusers and transformers and is imported by name.
"""

from .adapter import FlowAdapter, fuse_attention
from .checkpoint import PARTS, CheckpointError, load_checkpoint, read_config, save_checkpoint
from .config import (
    FORMAT_VERSION,
    FUSIONS,
    ConfigError,
    FlowAdapterConfig,
    FlowGeneratorConfig,
    S2DMConfig,
    SamplingConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from .flow_codec import constrain, decode_flow, encode_flow, mean_motion
from .flow_generator import FlowGenerator
from .presets import PUPPETS, SD15
from .tokenizer import train_tokenizer, with_tokenizer, write_tokenizer

__all__ = [
    "FORMAT_VERSION",
    "FUSIONS",
    "PARTS",
    "PUPPETS",
    "SD15",
    "CheckpointError",
    "ConfigError",
    "FlowAdapter",
    "FlowAdapterConfig",
    "FlowGenerator",
    "FlowGeneratorConfig",
    "S2DMConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TextEncoderConfig",
    "UNetConfig",
    "VAEConfig",
    "constrain",
    "decode_flow",
    "encode_flow",
    "fuse_attention",
    "load_checkpoint",
    "mean_motion",
    "read_config",
    "save_checkpoint",
    "train_tokenizer",
    "with_tokenizer",
    "write_tokenizer",
]
