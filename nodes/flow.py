"""Nodes that make flow and show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..s2dm.flow import FlowField, estimate_flow, flow_to_image
from ..s2dm.flow.estimate import METHODS, FlowModel, PairModel
from ..s2dm.models import FLOW_SAMPLERS, MAX_FRAMES, FlowSampling
from .native.stage1 import MIN_FRAMES, Stage1, generate_flow
from .pictures import first_picture, library_frames, video_components
from .schema import (
    advanced,
    cfg_input,
    check_finite,
    check_given,
    named_errors,
    schema,
    seed_input,
    steps_input,
)
from .types import Flow, FlowGenerator, NoFlowGenerator, OpticalFlowModel, flow_output

_MODEL = "model"
_BYTES = 32  # a pixel and frame while a flow is made and handed on, mask and all
_GIB = 1 << 30


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
                    optional=True,
                    tooltip=(
                        "The frames of one clip, in order. The flow has the same number of frames "
                        "and the same size; a single frame has no motion."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=[*METHODS, _MODEL],
                    default="dis",
                    tooltip=(
                        "dis: OpenCV's DIS, for most clips. farneback: OpenCV's Farneback, "
                        "smoother, but loses thin limbs. model: the network connected to "
                        "optical_flow, such as RAFT."
                    ),
                ),
                OpticalFlowModel.Input(
                    "optical_flow",
                    optional=True,
                    tooltip=(
                        'Network for the method "model": RAFT, from core\'s Load Optical Flow '
                        "Model (newer versions of ComfyUI), which is first tested on a known "
                        "shift; or a model from Load Region Motion (S2DM). Flow that another pack "
                        "has already measured can't be connected here."
                    ),
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip=(
                        "A video in place of frames: all of it, at its own size. Fit Clip takes "
                        "a part, at the size of the new clip."
                    ),
                ),
            ],
            outputs=[flow_output()],
        )

    @classmethod
    def execute(
        cls,
        method: str,
        frames: torch.Tensor | None = None,
        optical_flow: object = None,
        video: Any = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            if (frames is None) == (video is None):
                got = "neither. Connect one." if video is None else "both. Disconnect one."
                raise ValueError(f"expected frames or a video, got {got}")
            if frames is None:
                frames = video_components(video).images
            estimator = flow_model(optical_flow) if method == _MODEL else method
            clip = library_frames(frames)
            return io.NodeOutput(estimate_flow(clip, estimator, progress_bar(len(clip))))


class GenerateFlow(io.ComfyNode):
    """Stage 1: flow from words (paper, section 3.4)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMGenerateFlow",
            display_name="Generate Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Generates the motion of a clip from a prompt and a reference frame, with which "
                "the clip starts: stage 1 of text to video."
            ),
            search_aliases=["s2dm", "text to video", "animate", "motion", "stage 1", "image2video"],
            inputs=[
                FlowGenerator.Input(
                    "flow_generator",
                    tooltip=(
                        "From Load Checkpoint (S2DM), if the checkpoint holds stage 1, or LFDM's "
                        "from Load Region Motion (S2DM)."
                    ),
                ),
                io.Image.Input(
                    "reference",
                    tooltip=(
                        "The first frame of the clip, in any size; the flow gets the same size. Of "
                        "a batch, the first image is used; alpha is dropped."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=(
                        "What happens in the clip, worded like the prompt for the picture. Empty: "
                        "any motion that fits the frame."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=MIN_FRAMES,
                    max=MAX_FRAMES,
                    tooltip=(
                        "Number of frames of the flow, and so of the clip. The motion is "
                        "generated with as many frames as in training, then retimed: more frames "
                        "make it slower and add nothing new."
                    ),
                ),
                steps_input(1000, "Sampling steps."),
                cfg_input(
                    1.0,
                    "Guidance scale: how closely to follow the prompt. 1: no guidance, in half the "
                    "time.",
                ),
                seed_input(
                    "Seed of the motion, independent of the seed of the picture. Another seed "
                    "moves the same frame in another way."
                ),
                io.Float.Input(
                    "motion_strength",
                    default=0.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip=(
                        "Amount of motion. 1: the mean of the training clips; 0: as the prompt "
                        "suggests. Amounts far from those of the training clips are hardly "
                        "reached."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "sampler_name",
                    options=list(FLOW_SAMPLERS),
                    default=FLOW_SAMPLERS[0],
                    tooltip=(
                        "dpmpp_2m: second order, for few steps. ddim: first order. lfdm: as LFDM "
                        "samples, with fresh noise at every step (1000 steps: its ancestral "
                        "sampler)."
                    ),
                ),
            ],
            outputs=[flow_output()],
        )

    @classmethod
    def execute(
        cls,
        flow_generator: Any,
        reference: torch.Tensor,
        prompt: str,
        frames: int = 16,
        steps: int = 20,
        cfg: float = 1.0,
        seed: int = 0,
        motion_strength: float = 0.0,
        sampler_name: str = FLOW_SAMPLERS[0],
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(cfg=cfg, motion_strength=motion_strength)
            check_given(reference=reference)
            if not isinstance(flow_generator, Stage1):
                got = repr(flow_generator)
                if isinstance(flow_generator, NoFlowGenerator):
                    got = f"no flow generator: {flow_generator.why}"
                raise ValueError(
                    f"expected a flow generator (stage 1), got {got}. Load a "
                    "checkpoint that holds stage 1, or measure the motion of a clip with Estimate "
                    "Flow (S2DM)."
                )
            height, width = first_picture(reference, "reference").shape[2:]
            check_memory(frames, width, height)
            progress = progress_bar(steps)
            return io.NodeOutput(
                generate_flow(
                    flow_generator,
                    reference,
                    prompt,
                    frames,
                    FlowSampling(steps, cfg, sampler_name, motion_strength or None),
                    seed,
                    lambda step, denoised, noisy, total: progress(step + 1, total),
                )
            )


class VisualizeFlow(io.ComfyNode):
    """Flow as pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMVisualizeFlow",
            display_name="Visualize Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Shows flow as colours: the hue is the direction that a pixel came from, white is "
                "no motion. The whole clip has one scale, so the video doesn't flicker."
            ),
            search_aliases=["optical flow", "colour wheel", "color wheel", "preview flow"],
            is_output_node=True,
            inputs=[
                Flow.Input("flow", tooltip="The flow to show."),
                io.Float.Input(
                    "full_colour_at",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip=(
                        "Motion, in pixels, that gets full colour; longer motion is drawn darker. "
                        "0: the longest motion of the clip. To compare clips, set one value for "
                        "all."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="One image for each frame, as large as the flow; the first is white.",
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
            check_finite(full_colour_at=full_colour_at)
            check_given(flow=flow)
            image = flow_to_image(flow, full_colour_at or None).movedim(1, -1).contiguous()
            return io.NodeOutput(image, flow.occlusion[:, 0].clone(), ui=ui.PreviewImage(image))


def progress_bar(total: int) -> Callable[[int, int], None]:
    """A bar that takes (done, total), and stops the node when the user cancels."""
    bar = comfy.utils.ProgressBar(total)

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress


def check_memory(num_frames: int, width: int, height: int, more: int = 0) -> None:
    """Refuse what the machine can't hold, instead of taking it down.

    more: bytes a pixel and frame of what is made beside the flow.
    """
    needed = num_frames * width * height * (_BYTES + more)
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"expected a clip that fits into {free / _GIB:.1f} GiB of free memory, got "
            f"{num_frames} frames of {width}x{height}, which take {needed / _GIB:.1f} GiB. Take "
            "fewer frames or a smaller picture."
        )


def flow_model(connected: object) -> FlowModel | PairModel:
    """What to call for an object that came in through an OPTICAL_FLOW socket."""
    if isinstance(connected, ModelPatcher):
        comfy.model_management.load_models_gpu([connected])
        return connected.model
    if callable(connected):
        return connected
    got = "nothing" if connected is None else type(connected).__name__
    if hasattr(connected, "shape") or isinstance(connected, (list, tuple)):
        got = (
            f"{_shape(connected)}, flow that is measured already (other packs use the socket type "
            "OPTICAL_FLOW for flow from frame to frame, not back to the first)"
        )
    raise ValueError(
        f'expected a flow model at optical_flow, for the method "model", got {got}. Connect Load '
        "Optical Flow Model or Load Region Motion (S2DM), or choose dis or farneback."
    )


def _shape(flow: Any) -> str:
    if isinstance(flow, (list, tuple)):
        return f"a list of {len(flow)}"
    return f"a {type(flow).__name__} of shape {tuple(flow.shape)}"
