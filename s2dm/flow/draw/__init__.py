"""Motion that is drawn: layers, tracks and a camera, and the flow that they make."""

from .reading import default_radius, read_motion, read_points, read_tracks
from .render import Drawing, render
from .state import CameraKey, Layer, Mask, Motion, Polygon

__all__ = [
    "CameraKey",
    "Drawing",
    "Layer",
    "Mask",
    "Motion",
    "Polygon",
    "default_radius",
    "read_motion",
    "read_points",
    "read_tracks",
    "render",
]
