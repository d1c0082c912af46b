"""Flow adapter, flow generator, configurations, key maps, tokenizer and checkpoint format."""

from .adapter import FlowAdapter, fuse_attention
from .checkpoint import (
    PARTS,
    STAGE_1,
    STAGE_2,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_config,
    save_adapter,
    save_checkpoint,
)
from .config import (
    FORMAT_VERSION,
    FUSIONS,
    LATENT_CELL,
    AdapterTrainingConfig,
    FlowAdapterConfig,
    FlowGeneratorConfig,
    S2DMConfig,
    SamplingConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    whole_cells,
)
from .flow_codec import constrain, decode_flow, encode_flow, mean_motion
from .flow_generator import FlowGenerator
from .flow_sampling import FLOW_SAMPLERS, MAX_FRAMES, FlowSampling, check_reference
from .presets import PUPPETS, SD15
from .tokenizer import train_tokenizer, with_tokenizer, write_tokenizer
from .words import unknown_words, unknown_words_message

__all__ = [
    "FLOW_SAMPLERS",
    "FORMAT_VERSION",
    "FUSIONS",
    "LATENT_CELL",
    "MAX_FRAMES",
    "PARTS",
    "PUPPETS",
    "SD15",
    "STAGE_1",
    "STAGE_2",
    "AdapterTrainingConfig",
    "Checkpoint",
    "CheckpointError",
    "FlowAdapter",
    "FlowAdapterConfig",
    "FlowGenerator",
    "FlowGeneratorConfig",
    "FlowSampling",
    "S2DMConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TextEncoderConfig",
    "UNetConfig",
    "VAEConfig",
    "check_reference",
    "constrain",
    "decode_flow",
    "encode_flow",
    "fuse_attention",
    "load_checkpoint",
    "mean_motion",
    "read_config",
    "save_adapter",
    "save_checkpoint",
    "train_tokenizer",
    "unknown_words",
    "unknown_words_message",
    "whole_cells",
    "with_tokenizer",
    "write_tokenizer",
]
