"""The pack's own socket types, each defined once."""

from __future__ import annotations

from typing import NamedTuple

from comfy_api.latest import io

Flow = io.Custom("S2DM_FLOW")
"""A `FlowField`: the motion of a clip, measured from its first frame."""

FlowGenerator = io.Custom("S2DM_FLOW_GENERATOR")
"""Stage 1, which makes flow from a prompt and a reference frame: a `Stage1`, or in its place a
`NoFlowGenerator`."""


class NoFlowGenerator(NamedTuple):
    """What a checkpoint without stage 1 gives in place of a flow generator, and why it has none."""

    why: str


Clips = io.Custom("S2DM_CLIPS")
"""Clips prepared for training: a `PreparedClips`, which are files in a folder."""

Tracks = io.Custom("TRACKS")
"""Core's paths of points, as WanMove's nodes have them: {"track_path": (N,P,2) in pixels,
"track_visibility": (N,P) or (N,1) bool}. Versions of ComfyUI without those nodes have nothing to
connect."""

PoseKeypoints = io.Custom("POSE_KEYPOINT")
"""Keypoints in OpenPose's format, one dictionary a frame, from pose estimators: core's SDPose and
those of comfyui_controlnet_aux."""

OpticalFlowModel = io.Custom("OPTICAL_FLOW")
"""Core's RAFT model, from Load Optical Flow Model: a ModelPatcher. Versions of ComfyUI without
that node have nothing to connect here, and the socket does no harm."""


def flow_output(tooltip: str = "", name: str = "flow") -> io.Output:
    """The flow that a node makes; `name` where an input is called flow already."""
    told = tooltip or "Motion and occlusion of every frame, for Encode Flow or Visualize Flow."
    return Flow.Output(name, display_name="flow", tooltip=told)
