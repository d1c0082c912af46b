"""Nodes that change flow, put flows together, and move pictures by them."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..s2dm.flow import FlowField
from ..s2dm.flow.combine import combine_after, combine_in, combine_over
from ..s2dm.flow.edit import flip, keep_in, loop, ping_pong, smooth_in_space, smooth_in_time
from ..s2dm.flow.inverse import rebase, reverse
from ..s2dm.flow.warp import visibility, warp_picture
from .flow import check_memory, progress_bar
from .pictures import first_picture, library_masks
from .schema import advanced, check_finite, check_given, frames_input, named_errors, schema
from .types import Flow, flow_output

_OPERATIONS = (
    "scale",
    "reverse",
    "retime",
    "smooth",
    "smooth over time",
    "loop",
    "ping-pong",
    "crop",
    "resize",
    "flip horizontally",
    "flip vertically",
    "keep in mask",
)
_CAMERA, _AFTER, _IN_MASK = "second is the camera", "one after the other", "first in the mask"
_FRAME_1, _FIRST_PICKED = "frame 1", "the first picked"
_FILL, _STRETCH, _BLACK = "fill", "stretch", "black"
_MOVED = 24  # bytes a pixel and frame of what a moved picture and its masks take
_OF_ONE_LATENT = ("noise_mask", "batch_index")


class EditFlow(io.ComfyNode):
    """One change to a flow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMEditFlow",
            display_name="Edit Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Changes a flow as a whole: how far and how fast things move, in which order, "
                "where, and at which size."
            ),
            search_aliases=["reverse", "retime", "loop", "ping pong", "smooth", "crop", "flip"],
            inputs=[
                Flow.Input("flow", tooltip="The flow to change."),
                io.Combo.Input(
                    "operation",
                    options=list(_OPERATIONS),
                    default=_OPERATIONS[0],
                    tooltip=(
                        "scale: multiplies the motion by amount. reverse: plays it backwards, from "
                        "the last frame. retime: the same motion in another number of frames. "
                        "smooth: over amount pixels. smooth over time: over amount frames. loop, "
                        "ping-pong: repeats it amount times. crop, resize: to width and height. "
                        "keep in mask: nothing moves outside the mask; its edge is amount pixels "
                        "soft."
                    ),
                ),
                io.Float.Input(
                    "amount",
                    default=1.0,
                    min=-100.0,
                    max=1000.0,
                    step=0.05,
                    tooltip=(
                        "scale: the factor. smooth: number of pixels or frames. loop, ping-pong: "
                        "number of repetitions. keep in mask: width of the soft edge in pixels."
                    ),
                ),
                frames_input("Number of frames, for retime."),
                *(
                    io.Int.Input(
                        side,
                        default=128,
                        min=1,
                        max=8192,
                        tooltip=f"{side.capitalize()} in pixels, for crop and resize.",
                    )
                    for side in ("width", "height")
                ),
                *(
                    advanced(
                        io.Int.Input,
                        edge,
                        default=0,
                        min=0,
                        max=8192,
                        tooltip=f"Pixels that crop leaves out {where}.",
                    )
                    for edge, where in (("left", "at the left"), ("top", "at the top"))
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "For keep in mask: where things may move, one mask for all frames or one "
                        "for each."
                    ),
                ),
            ],
            outputs=[flow_output("The changed flow.", "edited_flow")],
        )

    @classmethod
    def execute(
        cls,
        flow: FlowField,
        operation: str = _OPERATIONS[0],
        amount: float = 1.0,
        frames: int = 16,
        width: int = 128,
        height: int = 128,
        left: int = 0,
        top: int = 0,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(amount=amount)
            check_given(flow=flow)
            changes = {
                "scale": lambda: flow.scale(amount),
                "reverse": lambda: reverse(flow),
                "retime": lambda: flow.retime(frames),
                "smooth": lambda: smooth_in_space(flow, amount),
                "smooth over time": lambda: smooth_in_time(flow, amount),
                "loop": lambda: loop(flow, round(amount)),
                "ping-pong": lambda: ping_pong(flow, round(amount)),
                "crop": lambda: _crop(flow, width, height, left, top),
                "resize": lambda: flow.resize(height, width),
                "flip horizontally": lambda: flip(flow, "horizontal"),
                "flip vertically": lambda: flip(flow, "vertical"),
                "keep in mask": lambda: keep_in(flow, library_masks(mask), amount),
            }
            if operation not in changes:
                raise ValueError(f"expected one of {', '.join(changes)}, got {operation!r}.")
            if operation == "retime":
                check_memory(frames, flow.width, flow.height)
            elif operation == "resize":
                check_memory(len(flow), width, height)
            elif operation in ("loop", "ping-pong"):
                check_memory(2 * len(flow) * max(round(amount), 1), flow.width, flow.height)
            return io.NodeOutput(changes[operation]())


class CombineFlow(io.ComfyNode):
    """Two flows as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMCombineFlow",
            display_name="Combine Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Puts two flows together: a camera over moving things, one motion after another, "
                "or each in its part of the picture."
            ),
            search_aliases=[
                "camera over objects",
                "compose flow",
                "concatenate flow",
                "merge flow",
            ],
            inputs=[
                Flow.Input(
                    "first", tooltip="Flow of the moving things, or the motion that comes first."
                ),
                Flow.Input(
                    "second",
                    tooltip=(
                        "Flow of the camera, or the motion that comes next. Of the same size."
                    ),
                ),
                io.Combo.Input(
                    "how",
                    options=[_CAMERA, _AFTER, _IN_MASK],
                    default=_CAMERA,
                    tooltip=(
                        "second is the camera: a camera films what the first flow moves; both have "
                        "the same number of frames. one after the other: the second starts from "
                        "the last frame of the first. first in the mask: the first inside the "
                        "mask, the second outside."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "For first in the mask: where the first flow is used. One mask for all "
                        "frames, or one for each."
                    ),
                ),
            ],
            outputs=[flow_output("The combined flow.")],
        )

    @classmethod
    def execute(
        cls,
        first: FlowField,
        second: FlowField,
        how: str = _CAMERA,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_given(first=first, second=second)
            if how == _IN_MASK:
                return io.NodeOutput(combine_in(first, second, library_masks(mask)))
            return io.NodeOutput((combine_over if how == _CAMERA else combine_after)(first, second))


class PickFlow(io.ComfyNode):
    """Some frames of a flow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMPickFlow",
            display_name="Pick Flow (S2DM)",
            category="s2dm/flow",
            description="Takes some frames of a flow, as Latent From Batch does with latents.",
            search_aliases=["select frames", "trim flow", "flow from batch", "every nth"],
            inputs=[
                Flow.Input("flow", tooltip="The flow to take frames from."),
                frames_input("The first frame to take, counted from 1.", 1, name="first_frame"),
                frames_input("How many frames to take; all of them if the flow is shorter."),
                frames_input("1: every frame, 2: every second one, and so on.", 1, name="every"),
                io.Combo.Input(
                    "measured_from",
                    options=[_FRAME_1, _FIRST_PICKED],
                    default=_FRAME_1,
                    tooltip=(
                        "frame 1: from the first frame of the whole flow, which is put before the "
                        "picked ones. the first picked: that frame becomes the new first frame; "
                        "use it with a picture of that frame."
                    ),
                ),
            ],
            outputs=[flow_output("The picked frames.", "picked_flow")],
        )

    @classmethod
    def execute(
        cls,
        flow: FlowField,
        first_frame: int = 1,
        frames: int = 16,
        every: int = 1,
        measured_from: str = _FRAME_1,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_given(flow=flow)
            picked = list(range(first_frame - 1, len(flow), every))[:frames]
            if not picked:
                raise ValueError(
                    f"expected a first_frame up to {len(flow)}, the number of frames of the flow, "
                    f"got {first_frame}."
                )
            if measured_from == _FIRST_PICKED:
                return io.NodeOutput(rebase(flow, picked))
            return io.NodeOutput(flow.select(picked if picked[0] == 0 else [0, *picked]))


class WarpImage(io.ComfyNode):
    """A picture moved by a flow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMWarpImage",
            display_name="Warp Image (S2DM)",
            category="s2dm/video",
            description=(
                "Moves a picture, a mask or a latent along a flow: one for each frame, and a mask "
                "of what the first frame doesn't show."
            ),
            search_aliases=[
                "warp",
                "remap",
                "motion transfer",
                "animate image",
                "move mask",
                "warp latent",
            ],
            inputs=[
                Flow.Input("flow", tooltip="The motion. It is resized to the picture."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The first frame. Of a batch, the first image is used; alpha is dropped."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="A mask on the first frame, to be moved along.",
                ),
                io.Combo.Input(
                    "holes",
                    options=[_FILL, _STRETCH, _BLACK],
                    default=_FILL,
                    tooltip=(
                        "What the image shows where the first frame doesn't. fill: painted from "
                        "the surroundings (needs OpenCV). stretch: whatever lies there, such as a "
                        "ghost of what moved away. black: nothing. Latents aren't painted: with "
                        "fill they are stretched."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The latent of the first frame, to be moved as well. Of a batch, the first "
                        "is used. A cell of a latent is 8 pixels wide, so a moved image is sharper "
                        "than a moved latent."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="The moved picture, one image for each frame; without one, the mask.",
                ),
                io.Mask.Output(
                    "hole_masks",
                    display_name="holes",
                    tooltip="White where the first frame doesn't show the pixel, for inpainting.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="The moved mask, one for each frame; without one, black.",
                ),
                io.Latent.Output(
                    "latents",
                    display_name="latents",
                    tooltip="The moved latent, one for each frame; without one, nothing.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        flow: FlowField,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        holes: str = _FILL,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_given(flow=flow)
            if image is None and mask is None and latent is None:
                raise ValueError(
                    "expected an image, a mask or a latent to move, got none. Connect one."
                )
            picture = None if image is None else first_picture(image, "image")
            small = None if mask is None else library_masks(mask)[:1]
            latents = None if latent is None else _moved_latent(latent, flow, holes)
            given = small if picture is None else picture
            height, width = (flow.height, flow.width) if given is None else given.shape[2:]
            check_memory(len(flow), width, height, _MOVED)
            flow = flow.resize(height, width)
            shown = visibility(flow)
            open_ = (shown < 0.5)[:, 0].float()
            if small is None:
                masks = torch.zeros_like(open_)
            else:
                if small.shape[2:] != (flow.height, flow.width):
                    raise ValueError(
                        f"expected a mask as large as the image, {flow.width}x{flow.height}, got "
                        f"{small.shape[3]}x{small.shape[2]}. Resize one of them."
                    )
                # Nothing is known to be masked in a hole.
                masks = (warp_picture(small, flow)[:, 0] * (1 - open_)).contiguous()
            if picture is None:
                images = masks[..., None].repeat(1, 1, 1, 3)
            else:
                images = _moved(picture, flow, shown, holes)
            return io.NodeOutput(images, open_, masks, latents)


def _moved_latent(latent: dict[str, Any], flow: FlowField, holes: str) -> dict[str, Any]:
    """The latent at every frame, (N,C,h,w) or (N,C,1,h,w)."""
    samples = latent["samples"]
    if samples.ndim not in (4, 5) or (samples.ndim == 5 and samples.shape[2] != 1):
        raise ValueError(
            f"expected the latent of a picture, (1,C,h,w), got {tuple(samples.shape)}. Latents of "
            "a video hold several frames in one: encode its first frame, or move images."
        )
    picture = samples[:1].flatten(1, -3) if samples.ndim == 5 else samples[:1]
    flow = flow.resize(*picture.shape[-2:])
    moved = flow.warp(picture.float().cpu())
    if holes == _BLACK:
        moved = moved * (visibility(flow) >= 0.5)
    moved = moved.to(samples.dtype).reshape(len(flow), *samples.shape[1:])
    # A noise mask and the numbers of a batch are of the latent that came in.
    kept = {name: value for name, value in latent.items() if name not in _OF_ONE_LATENT}
    return {**kept, "samples": moved}


def _moved(picture: torch.Tensor, flow: FlowField, shown: torch.Tensor, holes: str) -> torch.Tensor:
    """The picture at every frame, (N,H,W,3)."""
    images = torch.empty(len(flow), flow.height, flow.width, 3)
    progress = progress_bar(len(flow))
    for number in range(len(flow)):
        frame = slice(number, number + 1)
        moved = warp_picture(picture, flow, frame, shown if holes == _FILL else None)
        if holes == _BLACK:
            moved = moved * (shown[frame] >= 0.5)
        images[number] = moved[0].permute(1, 2, 0)
        progress(number + 1, len(flow))
    return images


def _crop(flow: FlowField, width: int, height: int, left: int, top: int) -> FlowField:
    if left + width > flow.width or top + height > flow.height:
        raise ValueError(
            f"expected a part of the picture, {flow.width}x{flow.height}, got {width}x{height} "
            f"from ({left}, {top}) on. Take a smaller width or height."
        )
    return flow.crop(height, width, top, left)
