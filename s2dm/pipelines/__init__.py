"""Diffusers pipelines: S2DM outside ComfyUI. Importing this package needs diffusers."""

from .flow_adapter import FlowAdapterModel
from .flow_to_video import FlowToVideoOutput, FlowToVideoPipeline

__all__ = ["FlowAdapterModel", "FlowToVideoOutput", "FlowToVideoPipeline"]
