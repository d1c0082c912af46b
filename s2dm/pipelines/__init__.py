"""Diffusers pipelines: S2DM outside ComfyUI. Importing this package needs diffusers."""

from .flow_adapter import FlowAdapterModel
from .flow_generation import FLOW_SAMPLERS, embed_prompts, flow_scheduler, generate_flow
from .flow_to_video import FlowToVideoOutput, FlowToVideoPipeline

__all__ = [
    "FLOW_SAMPLERS",
    "FlowAdapterModel",
    "FlowToVideoOutput",
    "FlowToVideoPipeline",
    "embed_prompts",
    "flow_scheduler",
    "generate_flow",
]
