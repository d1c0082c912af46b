"""The node that puts flow into CONDITIONING."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import node_helpers
import torch
from comfy_api.latest import io

from ..s2dm.flow import FlowField
from ..s2dm.models import LATENT_CELL, whole_cells
from .native.labels import LABEL, FlowLabel
from .native.recommended import AUTO
from .pictures import library_masks
from .schema import (
    advanced,
    check_finite,
    check_given,
    flow_strength,
    named_errors,
    schema,
    share_input,
    side_inputs,
)
from .types import Flow

_GUIDE_FLOW = ("auto", "on", "off")


class EncodeFlow(io.ComfyNode):
    """The flow label beside the prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMEncodeFlow",
            display_name="Encode Flow (S2DM)",
            category="s2dm/conditioning",
            description=(
                "Adds flow to the prompts and makes an empty latent for each frame. The sampled "
                "clip then follows the flow, frame by frame."
            ),
            search_aliases=["s2dm", "flow conditioning", "motion control", "optical flow"],
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="What the clip shows, from CLIP Text Encode."
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip=(
                        "What the clip must not show. The model was trained with an empty prompt "
                        "here."
                    ),
                ),
                Flow.Input(
                    "flow",
                    optional=True,
                    tooltip=(
                        "The motion of the clip, with one frame of flow for each frame. Without "
                        "flow: one still frame of this width and height."
                    ),
                ),
                flow_strength(
                    "How strongly flow acts. 0: not at all, the model chooses the motion; 1: as in "
                    "training. Less strength doesn't make the motion smaller."
                ),
                share_input(
                    "start_percent",
                    -1.0,
                    "Where in the noise schedule flow starts to act. Until then all frames with "
                    "shared noise are the same. -1: as the checkpoint recommends.",
                    least=-1.0,
                    folded=True,
                ),
                share_input(
                    "end_percent",
                    1.0,
                    "Where in the noise schedule flow stops acting.",
                    folded=True,
                ),
                advanced(
                    io.Combo.Input,
                    "guide_flow",
                    options=list(_GUIDE_FLOW),
                    default="auto",
                    tooltip=(
                        "auto: as the checkpoint recommends. on: guidance (cfg) strengthens "
                        "prompt and flow, as in the paper. off: the negative prompt gets the flow "
                        "too, so guidance strengthens the prompt alone."
                    ),
                ),
                *side_inputs(
                    "of the clip in pixels; the flow is resized to it. 0: that of the flow. "
                    "Rounded up to a multiple of 8.",
                    default=0,
                    least=0,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where flow acts; elsewhere the model chooses the motion. One mask for "
                        "all frames, or one for each."
                    ),
                ),
            ],
            outputs=[
                # Inputs and outputs have different ids: older versions insist.
                io.Conditioning.Output(
                    "positive_with_flow",
                    display_name="positive",
                    tooltip="The prompt with the flow.",
                ),
                io.Conditioning.Output(
                    "negative_with_flow",
                    display_name="negative",
                    tooltip="The negative prompt; guide_flow sets how it carries the flow.",
                ),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Empty latents of the size of the clip, one for each frame.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        negative: Any,
        flow: FlowField | None = None,
        strength: float = 1.0,
        start_percent: float = -1.0,
        end_percent: float = 1.0,
        guide_flow: str = "auto",
        width: int = 0,
        height: int = 0,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(strength=strength, start_percent=start_percent, end_percent=end_percent)
            check_given(positive=positive, negative=negative)
            if flow is None:
                flow = _still_frame(width, height)
            check_given(flow=flow)
            _check(flow, start_percent, end_percent, mask)
        start = None if start_percent < 0 else start_percent
        size = (height or flow.height, width or flow.width)
        canvas = [whole_cells(side) for side in size]
        if canvas != [*size]:
            flow = flow.resize(*size).pad(*canvas)
        label = FlowLabel(flow, strength, start, end_percent, mask)
        of_negative = {LABEL: None if guide_flow == "on" else label, AUTO: guide_flow == "auto"}
        samples = torch.zeros(
            flow.num_frames,
            4,
            *(side // LATENT_CELL for side in canvas),
            device=comfy.model_management.intermediate_device(),
        )
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, {LABEL: label}),
            node_helpers.conditioning_set_values(negative, of_negative),
            {"samples": samples},
        )


def _still_frame(width: int, height: int) -> FlowField:
    """The flow of a reference frame, from which others are measured: zero."""
    if not width or not height:
        raise ValueError(
            "expected a flow, or width and height for one frame that doesn't move, got no flow "
            f"and {width}x{height}. Connect a flow, or set both."
        )
    return FlowField.zeros(1, height, width)


def _check(flow: FlowField, start: float, end: float, mask: torch.Tensor | None) -> None:
    if start > end:
        raise ValueError(
            f"expected a start_percent of at most end_percent, got {start} and {end}. Swap them."
        )
    if mask is None:
        return
    if len(library_masks(mask)) not in (1, flow.num_frames):
        raise ValueError(
            f"expected one mask, or one for each of the {flow.num_frames} frames, got "
            f"{tuple(mask.shape)}. Repeat or pick masks to match the flow."
        )
