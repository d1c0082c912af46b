"""Nodes that make flow of what is drawn: layers and tracks, a camera, paths of other tools."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..s2dm.flow import FlowField
from ..s2dm.flow.draw import (
    CameraKey,
    Layer,
    Mask,
    Motion,
    read_motion,
    read_points,
    read_tracks,
    render,
)
from ..s2dm.flow.draw.state import SPEEDS
from ..s2dm.flow.geometry import resample
from ..s2dm.flow.tracks import flow_to_tracks, grid_points, tracks_from_paths, tracks_to_json
from .flow import check_memory
from .pictures import first_picture, library_masks
from .schema import (
    MOST_FRAMES,
    check_finite,
    check_given,
    frames_input,
    named_errors,
    schema,
    side_inputs,
)
from .types import Flow, Tracks, flow_output

_PICTURE = "s2dm_picture"  # the name under which the editor looks for it


def _depth_input() -> io.Input:
    return io.Image.Input(
        "depth",
        optional=True,
        tooltip=(
            "Depth map of the first frame, white is near. It gives parallax: near things move "
            "faster when the camera pans. From any depth node, in any size."
        ),
    )


class DrawFlow(io.ComfyNode):
    """Motion drawn on a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMDrawFlow",
            display_name="Draw Motion (S2DM)",
            category="s2dm/flow",
            description=(
                "Turns drawn motion into flow: layers, each a part of the picture with its paths "
                "and pins, and a camera."
            ),
            search_aliases=[
                "draw",
                "motion brush",
                "spline",
                "trajectory",
                "path",
                "drag",
                "puppet",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The first frame, to draw on. The flow gets its size. Of a batch, the "
                        "first image is used."
                    ),
                ),
                io.String.Input(
                    "motion",
                    multiline=True,
                    default="",
                    tooltip=(
                        "The drawing as JSON, which the editor writes. Paths from other editors "
                        "(lists of points with x and y) can be pasted. Empty: nothing moves."
                    ),
                ),
                frames_input("Number of frames of the flow."),
                *side_inputs(
                    "of the flow in pixels. Used without an image; otherwise the image sets it."
                ),
                _depth_input(),
            ],
            outputs=[
                flow_output(),
                io.Mask.Output(
                    "moving",
                    display_name="moving",
                    tooltip="White where a drawn layer lies, for each frame.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        motion: str,
        frames: int = 16,
        width: int = 128,
        height: int = 128,
        image: torch.Tensor | None = None,
        depth: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            picture = None if image is None else first_picture(image, "image")
            if picture is not None:
                height, width = picture.shape[2:]
            drawn = read_motion(motion, width, height)
            check_memory(frames, width, height)
            drawing = render(drawn, frames, _depth(depth, width, height))
            # The editor shows it where it couldn't know the picture before.
            shown = {}
            if picture is not None:
                shown = {_PICTURE: ui.PreviewImage(picture.movedim(1, -1).float()).values}
            return io.NodeOutput(drawing.flow, drawing.cover[:, 0].float(), ui=shown)


class CameraFlow(io.ComfyNode):
    """A camera that moves before a still picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMCameraFlow",
            display_name="Camera Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Makes the flow of a camera that pans, zooms and rolls, from the first frame to "
                "the last. To put it on top of other motion, use Combine Flow."
            ),
            search_aliases=["camera", "pan", "zoom", "roll", "dolly", "ken burns", "parallax"],
            inputs=[
                frames_input("Number of frames of the flow."),
                *side_inputs("of the flow in pixels. Use that of the picture."),
                *(
                    io.Float.Input(
                        f"pan_{axis}",
                        default=0.0,
                        min=-8192.0,
                        max=8192.0,
                        step=1.0,
                        tooltip=(
                            f"How far the camera moves {way}, in pixels, until the last frame; the "
                            "picture moves the other way."
                        ),
                    )
                    for axis, way in (("x", "to the right"), ("y", "down"))
                ),
                io.Float.Input(
                    "zoom",
                    default=1.0,
                    min=0.05,
                    max=20.0,
                    step=0.01,
                    tooltip="How much larger the picture is in the last frame; 1: no zoom.",
                ),
                io.Float.Input(
                    "roll",
                    default=0.0,
                    min=-3600.0,
                    max=3600.0,
                    step=1.0,
                    tooltip=(
                        "How far the camera turns clockwise, in degrees; the picture turns the "
                        "other way."
                    ),
                ),
                io.Combo.Input(
                    "speed",
                    options=[speed for speed in SPEEDS if speed != "hold"],
                    default="linear",
                    tooltip=(
                        "linear: constant speed. ease: slow start and slow end. ease_in: slow "
                        "start. ease_out: slow end."
                    ),
                ),
                _depth_input(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="What the camera films: the flow gets its width and height.",
                ),
            ],
            outputs=[flow_output()],
        )

    @classmethod
    def execute(
        cls,
        frames: int = 16,
        width: int = 128,
        height: int = 128,
        pan_x: float = 0.0,
        pan_y: float = 0.0,
        zoom: float = 1.0,
        roll: float = 0.0,
        speed: str = "linear",
        depth: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(pan_x=pan_x, pan_y=pan_y, zoom=zoom, roll=roll)
            if image is not None:
                height, width = first_picture(image, "image").shape[2:]
            key = CameraKey(1.0, pan_x, pan_y, zoom, roll)
            motion = Motion(width, height, camera=(key,), camera_speed=speed)
            check_memory(frames, width, height)
            return io.NodeOutput(render(motion, frames, _depth(depth, width, height)).flow)


class TracksToFlow(io.ComfyNode):
    """Paths of other editors and of core, as flow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMTracksToFlow",
            display_name="Tracks to Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Turns paths into flow: each path carries along what is around it, or all of them "
                "together move what is in a mask. For paths from spline editors, ATI and WanMove."
            ),
            search_aliases=["tracks", "trajectory", "spline", "ati", "wanmove", "coordinates"],
            inputs=[
                io.String.Input(
                    "coordinates",
                    multiline=True,
                    default="",
                    tooltip=(
                        "Paths in pixels as JSON: a list of paths, each a list of points with x "
                        "and y, beginning in the first frame. The points are spread evenly over "
                        "the clip."
                    ),
                ),
                frames_input(
                    "Number of frames of the flow. 0: as many as the longest path has points.",
                    least=0,
                ),
                *side_inputs(
                    "of the flow in pixels. Use that of the picture that the paths lie on."
                ),
                io.Float.Input(
                    "radius",
                    default=16.0,
                    min=0.5,
                    max=8192.0,
                    step=0.5,
                    tooltip=(
                        "Distance from its start, in pixels, within which a path carries "
                        "everything along. The motion fades out up to twice that distance. Not "
                        "used with a mask."
                    ),
                ),
                Tracks.Input(
                    "tracks",
                    optional=True,
                    tooltip=(
                        "Paths from core's WanMove nodes, together with the coordinates or instead "
                        "of them."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "The part of the first frame that the paths move. Everything else stays "
                        "still."
                    ),
                ),
            ],
            outputs=[flow_output()],
        )

    @classmethod
    def execute(
        cls,
        coordinates: str,
        frames: int = 16,
        width: int = 128,
        height: int = 128,
        radius: float = 16.0,
        tracks: Any = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(radius=radius)
            paths = read_tracks(coordinates, (width, height)) + _core_tracks(tracks)
            if not paths:
                raise ValueError(
                    "expected at least one path, got none. Paste coordinates, or connect tracks."
                )
            region = None if mask is None else Mask(library_masks(mask)[0, 0].numpy() > 0.5)
            layer = Layer(region=region, tracks=paths, radius=radius)
            frames = frames or min(max(map(len, paths)), MOST_FRAMES)
            check_memory(frames, width, height)
            return io.NodeOutput(render(Motion(width, height, (layer,)), frames).flow)


class FlowToTracks(io.ComfyNode):
    """Points that are followed through a flow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMFlowToTracks",
            display_name="Flow to Tracks (S2DM)",
            category="s2dm/flow",
            description=(
                "Follows points of the first frame through a flow, for models that take paths."
            ),
            search_aliases=[
                "tracks",
                "trajectory",
                "ati",
                "wanmove",
                "coordinates",
                "point tracking",
            ],
            inputs=[
                Flow.Input("flow", tooltip="The flow to follow."),
                io.String.Input(
                    "points",
                    multiline=True,
                    default="",
                    tooltip=(
                        "Points of the first frame in pixels, as JSON: a list of points with x and "
                        "y. Of paths, the first points are used. Empty: a grid over the picture."
                    ),
                ),
                io.Float.Input(
                    "spacing",
                    default=32.0,
                    min=1.0,
                    max=8192.0,
                    step=1.0,
                    tooltip="Distance of the points of the grid, in pixels.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "coordinates",
                    display_name="coordinates",
                    tooltip=(
                        "The paths as JSON, one point for each frame, for ATI, WanMove and the "
                        "like."
                    ),
                ),
                Tracks.Output(
                    "tracks",
                    display_name="tracks",
                    tooltip="The paths and where they are hidden, for core's WanMove nodes.",
                ),
            ],
        )

    @classmethod
    def execute(cls, flow: FlowField, points: str = "", spacing: float = 32.0) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(spacing=spacing)
            check_given(flow=flow)
            if points.strip():
                starts = torch.from_numpy(read_points(points))
            else:
                starts = grid_points(flow.width, flow.height, spacing)
            paths, seen = flow_to_tracks(flow, starts)
            tracks = {"track_path": paths, "track_visibility": seen}
            return io.NodeOutput(tracks_to_json(paths), tracks)


def _core_tracks(tracks: Any) -> tuple[Any, ...]:
    if tracks is None:
        return ()
    if not isinstance(tracks, dict) or not isinstance(tracks.get("track_path"), torch.Tensor):
        raise ValueError(
            f"expected tracks of core's WanMove nodes, got {type(tracks).__name__}. Connect Wan "
            "Move Tracks From Coords or the like, or paste coordinates."
        )
    seen = tracks.get("track_visibility")
    return tracks_from_paths(tracks["track_path"], None if seen is None else torch.as_tensor(seen))


def _depth(depth: torch.Tensor | None, width: int, height: int) -> torch.Tensor | None:
    """IMAGE to (1,1,H,W) in [0,1], the mean of its colours."""
    if depth is None:
        return None
    grey = first_picture(depth, "depth").mean(dim=1, keepdim=True)
    return resample(grey.float().cpu(), height, width).clamp(0, 1)
