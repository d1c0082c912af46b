"""A node that makes flow of the keypoints of people."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..s2dm.flow import pose_flow
from ..s2dm.flow.openpose import PEOPLE, poses, read_openpose
from .flow import check_memory
from .native.flow_listing import find_flow, list_poses, mark_of
from .schema import MOST_FRAMES, check_finite, named_errors, schema, share_input, side_inputs
from .types import PoseKeypoints, flow_output

_NONE = "none"


class PoseToFlow(io.ComfyNode):
    """People move as their keypoints say."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="S2DMPoseToFlow",
            display_name="Pose to Flow (S2DM)",
            category="s2dm/flow",
            description=(
                "Makes flow of the keypoints of people: each limb moves as its bone does, all else "
                "stands still. From a pose estimator, or from files of OpenPose."
            ),
            search_aliases=["openpose", "dwpose", "skeleton", "keypoints", "motion transfer"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[_NONE, *list_poses()],
                    default=_NONE,
                    tooltip=(
                        "Keypoints from the input or output folder of ComfyUI, in place of those "
                        "that are connected: a folder of *_keypoints.json, as OpenPose writes "
                        "them, or one .json file with all frames. Reload the page to see new ones."
                    ),
                ),
                io.Combo.Input(
                    "people",
                    options=list(PEOPLE),
                    default=PEOPLE[0],
                    tooltip=(
                        "largest: the person who is largest in the first frame. all: everybody who "
                        "is in the first frame."
                    ),
                ),
                *side_inputs(
                    "of the flow in pixels. 0: as the picture in which the keypoints were found; "
                    "OpenPose's own files don't say it.",
                    default=0,
                    least=0,
                ),
                share_input(
                    "least_confidence",
                    0.3,
                    "Keypoints that are less certain count as not found; they are put where a "
                    "straight line in time leads.",
                    folded=True,
                ),
                PoseKeypoints.Input(
                    "keypoints",
                    optional=True,
                    tooltip=(
                        "Keypoints of all frames of a clip, from a pose estimator such as DWPose "
                        "or SDPose."
                    ),
                ),
            ],
            outputs=[flow_output()],
        )

    @classmethod
    def execute(
        cls,
        file: str = _NONE,
        people: str = PEOPLE[0],
        width: int = 0,
        height: int = 0,
        least_confidence: float = 0.3,
        keypoints: Any = None,
    ) -> io.NodeOutput:
        with named_errors(cls):
            check_finite(least_confidence=least_confidence)
            if (file == _NONE) == (keypoints is None):
                got = "neither. Connect or choose some." if keypoints is None else "both."
                raise ValueError(f"expected keypoints from a socket or a file, got {got}")
            frames = read_openpose(find_flow(file, "keypoints")) if keypoints is None else keypoints
            found = poses(frames, width, height, people, least_confidence)
            count = len(found.keypoints)
            if count > MOST_FRAMES:
                raise ValueError(f"expected at most {MOST_FRAMES} frames, got {count}.")
            check_memory(count, found.width, found.height)
            return io.NodeOutput(pose_flow(found.keypoints, found.height, found.width))

    @classmethod
    def fingerprint_inputs(cls, file: str = _NONE, **inputs: Any) -> str:
        """Changes when the file or a file of the folder does."""
        return _NONE if file == _NONE else mark_of(file)
