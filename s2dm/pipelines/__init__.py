"""Diffusers pipelines: S2DM outside ComfyUI. Importing this package needs diffusers."""

from .animate import animate
from .flow_generation import embed_prompts, flow_scheduler, generate_flow
from .flow_to_video import FlowToVideoOutput, FlowToVideoPipeline
from .text_to_video import TextToVideoOutput, TextToVideoPipeline, open_pipeline, read_index
from .wrapped import FlowAdapterModel, FlowGeneratorModel

__all__ = [
    "FlowAdapterModel",
    "FlowGeneratorModel",
    "FlowToVideoOutput",
    "FlowToVideoPipeline",
    "TextToVideoOutput",
    "TextToVideoPipeline",
    "animate",
    "embed_prompts",
    "flow_scheduler",
    "generate_flow",
    "open_pipeline",
    "read_index",
]
