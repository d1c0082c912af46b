"""The pack's own socket types, each defined once."""

from comfy_api.latest import io

Flow = io.Custom("S2DM_FLOW")
"""A `FlowField`: the motion of a clip, measured from its first frame."""

FlowGenerator = io.Custom("S2DM_FLOW_GENERATOR")
"""Stage 1, which makes flow from a prompt and a reference frame: a `Stage1`, or in its place a
`NoFlowGenerator`, which is false."""

OpticalFlowModel = io.Custom("OPTICAL_FLOW")
"""Core's RAFT model, from Load Optical Flow Model: a ModelPatcher. Versions of ComfyUI without
that node have nothing to connect here, and the socket does no harm."""
