"""Nodes that make flow and show it."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..s2dm.flow import FlowField, estimate_flow, flow_to_image
from ..s2dm.flow.estimate import METHODS, FlowModel
from .schema import named_errors, schema
from .types import Flow, OpticalFlowModel

_MODEL = "model"


class EstimateFlow(io.ComfyNode):
    """How the people and things in a clip move, measured from its first frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMEstimateFlow",
            display_name="Estimate Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Measures the motion of a clip: optical flow from every frame back to the first, "
                "and which pixels the first frame doesn't show."
            ),
            search_aliases=["optical flow", "motion", "raft", "dis", "farneback"],
            inputs=[
                io.Image.Input(
                    "frames",
                    tooltip=(
                        "The frames of one clip, in order. Their number and their size become "
                        "those of the flow; a single frame gives no motion."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=[*METHODS, _MODEL],
                    default="dis",
                    tooltip=(
                        "dis: the best of OpenCV, for most clips. farneback: smoother, loses thin "
                        "limbs. model: the network connected below, the best for real footage."
                    ),
                ),
                OpticalFlowModel.Input(
                    "optical_flow",
                    optional=True,
                    tooltip=(
                        'Only for the method "model": RAFT, from core\'s Load Optical Flow Model '
                        "(newer versions of ComfyUI)."
                    ),
                ),
            ],
            outputs=[
                Flow.Output(
                    "flow",
                    display_name="flow",
                    tooltip="Motion and occlusion of every frame, for Encode Flow or to look at.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, frames: torch.Tensor, method: str, optical_flow: object = None
    ) -> io.NodeOutput:
        with named_errors(cls):
            estimator = _flow_model(optical_flow) if method == _MODEL else method
            bar = comfy.utils.ProgressBar(len(frames))

            def progress(done: int, total: int) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(done, total)

            return io.NodeOutput(estimate_flow(_library_frames(frames), estimator, progress))


class VisualizeFlow(io.ComfyNode):
    """Flow as pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMVisualizeFlow",
            display_name="Visualize Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Shows flow as colours: the hue is the direction a pixel came from, white is no "
                "motion. One scale holds for the whole clip, so the video doesn't flicker."
            ),
            search_aliases=["optical flow", "colour wheel", "color wheel", "preview flow"],
            inputs=[
                Flow.Input("flow", tooltip="The flow to look at."),
                io.Float.Input(
                    "full_colour_at",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip=(
                        "Motion in pixels that is drawn in full colour; longer motion is drawn "
                        "darker. 0: the longest motion of the clip. Set it to compare clips."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="One picture a frame, as large as the flow; the first is white.",
                ),
                io.Mask.Output(
                    "occlusion",
                    display_name="occlusion",
                    tooltip="White where the first frame doesn't show the pixel.",
                ),
            ],
        )

    @classmethod
    def execute(cls, flow: FlowField, full_colour_at: float = 0.0) -> io.NodeOutput:
        with named_errors(cls):
            image = flow_to_image(flow, full_colour_at or None)
            return io.NodeOutput(image.movedim(1, -1).contiguous(), flow.occlusion[:, 0].clone())


def _library_frames(images: torch.Tensor) -> torch.Tensor:
    """IMAGE (N,H,W,C) as the library wants it: (N,3,H,W) in [0,1], alpha dropped."""
    return images[..., :3].movedim(-1, 1).clamp(0, 1)


def _flow_model(connected: object) -> FlowModel:
    """What to call for an object that came in through an OPTICAL_FLOW socket."""
    if isinstance(connected, ModelPatcher):
        comfy.model_management.load_models_gpu([connected])
        return connected.model
    if callable(connected):
        return connected
    got = "nothing" if connected is None else type(connected).__name__
    raise ValueError(
        f'the method "model" needs a flow model at optical_flow, got {got}: connect Load '
        "Optical Flow Model, or choose dis or farneback"
    )
