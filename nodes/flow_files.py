"""Nodes that keep flow in files."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..s2dm.flow import FlowField, load_flow, save_flow
from ..s2dm.flow.files import MEASURED_TO
from ..s2dm.flow.frame_files import LAYOUTS
from .native.flow_listing import find_flow, list_flows, mark_of
from .schema import check_given, named_errors, schema
from .types import Flow, flow_output

_NPZ = "npz"
_PREFIX = "flow/s2dm"


class SaveFlow(io.ComfyNode):
    """Flow into a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMSaveFlow",
            display_name="Save Flow (S2DM)",
            category="s2dm/flow",
            description="Writes a flow into the output folder, for later or for other programs.",
            search_aliases=["export flow", "flo", "exr", "st map", "motion vectors", "kitti"],
            is_output_node=True,
            inputs=[
                Flow.Input("flow", tooltip="The flow to keep."),
                io.String.Input(
                    "filename_prefix",
                    default=_PREFIX,
                    tooltip=(
                        "Name in the output folder; it may begin with a subfolder. A number is "
                        "added."
                    ),
                ),
                io.Combo.Input(
                    "format",
                    options=[_NPZ, *LAYOUTS],
                    default=_NPZ,
                    tooltip=(
                        "npz: the whole flow in one file. The others are folders with one file for "
                        "each frame. flo: Middlebury, without occlusion. kitti: 16-bit PNG, in "
                        "steps of 1/64 pixel. exr: motion vectors. st_map: an ST map. The last two "
                        "are for compositing software and need the Python package OpenEXR."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("path", display_name="path", tooltip="The file or the folder.")
            ],
        )

    @classmethod
    def execute(
        cls, flow: FlowField, filename_prefix: str = _PREFIX, format: str = _NPZ
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_given(flow=flow)
            # Of a name without letters core would make a hidden file, each time the same.
            prefix = filename_prefix if filename_prefix.strip(" ./\\") else _PREFIX
            folder, name, counter, _, _ = folder_paths.get_save_image_path(
                prefix, folder_paths.get_output_directory()
            )
            path = Path(folder) / f"{name}_{counter:05}_"
            if format == _NPZ:
                path = path.with_name(path.name + ".npz")
                save_flow(path, flow)
            else:
                save_flow(path, flow, layout=format)
            return io.NodeOutput(str(path))


class LoadFlow(io.ComfyNode):
    """Flow from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMLoadFlow",
            display_name="Load Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Reads a flow from the input or output folder: what Save Flow wrote, or files of "
                "other programs."
            ),
            search_aliases=["import flow", "flo", "exr", "st map", "motion vectors", "kitti"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_flows(),
                    tooltip=(
                        "A .npz or .flo file, or a folder of .flo, .exr or 16-bit .png files, in "
                        "the input or output folder of ComfyUI. Reload the page to see new ones."
                    ),
                ),
                io.Combo.Input(
                    "measured_to",
                    options=list(MEASURED_TO),
                    default=MEASURED_TO[0],
                    tooltip=(
                        "What the files of a folder say of each pixel. frame 1: where it was in "
                        "the first frame, as Save Flow writes. previous frame: where it was one "
                        "frame before. next frame: where it goes. No file says which; most "
                        "programs write one of the last two. A .npz file is always the first."
                    ),
                ),
            ],
            outputs=[flow_output("The flow, measured from frame 1.")],
        )

    @classmethod
    def execute(cls, file: str, measured_to: str = MEASURED_TO[0]) -> io.NodeOutput:
        with named_errors(cls):
            return io.NodeOutput(load_flow(find_flow(file, "a flow"), measured_to))

    @classmethod
    def fingerprint_inputs(cls, file: str, measured_to: str = MEASURED_TO[0]) -> str:
        """Changes when the file or a file of the folder does."""
        return mark_of(file)
