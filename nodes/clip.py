"""The node that brings a video to the frames and the size that a model knows."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy_api.latest import io

from .flow import check_memory
from .pictures import video_components
from .schema import check_given, frames_input, named_errors, schema, side_inputs


class FitClip(io.ComfyNode):
    """Frames of a video, as many and as large as a model knows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMFitClip",
            display_name="Fit Clip (S2DM)",
            category="s2dm/video",
            description=(
                "Takes frames from a video, crops them at the centre and resizes them to the size "
                "of the new clip."
            ),
            search_aliases=["s2dm", "video to frames", "crop video", "resize video", "trim"],
            inputs=[
                io.Video.Input("video", tooltip="From Load Video."),
                frames_input("How many frames to take; all of them if the video is shorter."),
                io.Int.Input(
                    "first_frame",
                    default=1,
                    min=1,
                    max=1_000_000,
                    tooltip=(
                        "The frame to start at, counted from 1. All motion is measured from it, so "
                        "choose one that shows the person well."
                    ),
                ),
                *side_inputs(
                    "of the frames in pixels: 128 for the bundled checkpoint, 512 for most Stable "
                    "Diffusion 1.5 models."
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="frames",
                    tooltip="The frames, for Estimate Flow.",
                ),
                io.Float.Output(
                    "fps",
                    display_name="fps",
                    tooltip="Frame rate of the video, for Create Video.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        video: Any,
        frames: int = 16,
        first_frame: int = 1,
        width: int = 128,
        height: int = 128,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_given(video=video)
            clip = video_components(video)
            images = clip.images[first_frame - 1 :][:frames]
            if not len(images):
                raise ValueError(
                    f"expected a first_frame of at most {len(clip.images)}, the last frame of "
                    f"the video, got {first_frame}. Begin earlier."
                )
            check_memory(len(images), width, height)
        fitted = comfy.utils.common_upscale(
            images[..., :3].movedim(-1, 1), width, height, "lanczos", "center"
        )
        return io.NodeOutput(fitted.movedim(1, -1).contiguous(), float(clip.frame_rate))
