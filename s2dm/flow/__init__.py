"""Optical flow: the field, its estimation from frames, its colours and its files."""

from .colour import flow_to_image
from .estimate import estimate_flow
from .field import FlowError, FlowField
from .files import load_flow, save_flow
from .pose import pose_flow

__all__ = [
    "FlowError", "FlowField", "estimate_flow", "flow_to_image", "load_flow", "pose_flow",
    "save_flow",
]  # fmt: skip
