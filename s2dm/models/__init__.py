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
from .config.adapter import FUSIONS, AdapterTrainingConfig, FlowAdapterConfig
from .config.checkpoint import FORMAT_VERSION, S2DMConfig
from .config.networks import (
    LATENT_CELL,
    BertConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    whole_cells,
)
from .config.sampling import SamplingConfig, ScheduleConfig
from .config.stage1 import FlowGeneratorConfig, RegionMotionConfig
from .flow_codec import constrain, decode_flow, encode_flow, mean_motion
from .flow_generator import FlowGenerator
from .flow_sampling import FLOW_SAMPLERS, MAX_FRAMES, FlowSampling, check_reference
from .lfdm_conditions import LFDMConditions, lfdm_conditions
from .lfdm_sampling import lfdm_times, sample_as_lfdm
from .presets import PUPPETS, SD15
from .region_motion import RegionMotion
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
    "BertConfig",
    "Checkpoint",
    "CheckpointError",
    "FlowAdapter",
    "FlowAdapterConfig",
    "FlowGenerator",
    "FlowGeneratorConfig",
    "FlowSampling",
    "LFDMConditions",
    "RegionMotion",
    "RegionMotionConfig",
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
    "lfdm_conditions",
    "lfdm_times",
    "load_checkpoint",
    "mean_motion",
    "read_config",
    "sample_as_lfdm",
    "save_adapter",
    "save_checkpoint",
    "train_tokenizer",
    "unknown_words",
    "unknown_words_message",
    "whole_cells",
    "with_tokenizer",
    "write_tokenizer",
]
