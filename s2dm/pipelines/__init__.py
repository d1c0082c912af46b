"""Diffusers pipelines: S2DM outside ComfyUI. Importing this package needs diffusers."""

from .flow_adapter import FlowAdapterModel
from .flow_generation import FLOW_SAMPLERS, embed_prompts, flow_scheduler, generate_flow
from .flow_generator import FlowGeneratorModel
from .flow_to_video import FlowToVideoOutput, FlowToVideoPipeline
from .text_to_video import MAX_FRAMES, TextToVideoOutput, TextToVideoPipeline

__all__ = [
    "FLOW_SAMPLERS",
    "MAX_FRAMES",
    "FlowAdapterModel",
    "FlowGeneratorModel",
    "FlowToVideoOutput",
    "FlowToVideoPipeline",
    "TextToVideoOutput",
    "TextToVideoPipeline",
    "embed_prompts",
    "flow_scheduler",
    "generate_flow",
]
