"""What is connected or pasted by mistake gives a clear error over HTTP, and the server goes on."""

import json
from typing import Any

import pytest
from comfyui_server import ComfyServer, PromptError

pytestmark = pytest.mark.comfyui

PATH = '[[{"x": 10, "y": 20}, {"x": 30, "y": 20}]]'
THOUSAND = [{"x": 10 + number / 50, "y": 20} for number in range(1000)]


def prompt(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of the pack behind a small flow ("1"), a picture ("2") and a mask ("3")."""
    image = {"width": 64, "height": 48, "batch_size": 1, "color": 0}
    nodes = {
        "1": {
            "class_type": "S2DMTracksToFlow",
            "inputs": {
                "coordinates": PATH,
                "frames": 3,
                "width": 64,
                "height": 48,
                "radius": 8.0,
            },
        },
        "2": {"class_type": "EmptyImage", "inputs": image},
        "3": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}},
        "4": {"class_type": kind, "inputs": inputs},
    }
    last = {"flow": ["4", 0], "full_colour_at": 0.0}
    if kind == "S2DMWarpImage":
        nodes["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    elif kind == "S2DMFlowToTracks":
        again = {**nodes["1"]["inputs"], "coordinates": ["4", 0]}
        nodes["6"] = {"class_type": "S2DMTracksToFlow", "inputs": again}
        last["flow"] = ["6", 0]
        nodes["5"] = {"class_type": "S2DMVisualizeFlow", "inputs": last}
    elif kind not in ("S2DMSaveFlow", "S2DMVisualizeFlow"):
        nodes["5"] = {"class_type": "S2DMVisualizeFlow", "inputs": last}
    return nodes


FLOW, IMAGE, MASK = ["1", 0], ["2", 0], ["3", 0]
DRAW = {"motion": "", "frames": 3, "width": 64, "height": 48}
CAMERA = {
    "frames": 3,
    "width": 64,
    "height": 48,
    "pan_x": 0.0,
    "pan_y": 0.0,
    "zoom": 1.0,
    "roll": 0.0,
    "speed": "linear",
}
TRACKS = {"coordinates": PATH, "frames": 3, "width": 64, "height": 48, "radius": 8.0}
EDIT = {
    "flow": FLOW,
    "operation": "scale",
    "amount": 1.0,
    "frames": 3,
    "width": 64,
    "height": 48,
    "left": 0,
    "top": 0,
}
PICK = {"flow": FLOW, "first_frame": 1, "frames": 2, "every": 1, "measured_from": "frame 1"}
POSE = {"file": "none", "people": "largest", "width": 0, "height": 0, "least_confidence": 0.3}
NAN = float("nan")

# The node, what it is given, and what its error has to say.
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "draw, JSON of another tool": (
        "S2DMDrawFlow",
        {**DRAW, "motion": '{"nodes": [], "links": []}'},
        "JSON of something else",
    ),
    "draw, no JSON": ("S2DMDrawFlow", {**DRAW, "motion": "wave the arm"}, "expected JSON"),
    "draw, NaN": ("S2DMDrawFlow", {**DRAW, "motion": '[[{"x": NaN, "y": 1}]]'}, "finite x and y"),
    "draw, a number far away": (
        "S2DMDrawFlow",
        {**DRAW, "motion": '[[{"x": 1e300, "y": 1}]]'},
        r"\[0\]\[0\].x: expected a number",
    ),
    "draw, a later version": (
        "S2DMDrawFlow",
        {**DRAW, "motion": '{"version": 2, "layers": []}'},
        "update it",
    ),
    "draw, more than the memory": (
        "S2DMDrawFlow",
        {**DRAW, "frames": 4096, "width": 8192, "height": 8192},
        "GiB",
    ),
    "camera, NaN": ("S2DMCameraFlow", {**CAMERA, "pan_x": NAN}, "pan_x: expected a finite"),
    "tracks, none": ("S2DMTracksToFlow", {**TRACKS, "coordinates": ""}, "at least one path"),
    "tracks, NaN": ("S2DMTracksToFlow", {**TRACKS, "radius": NAN}, "radius: expected a finite"),
    "tracks, JSON of another tool": (
        "S2DMTracksToFlow",
        {**TRACKS, "coordinates": '{"points": [1, 2]}'},
        "expected a list of paths",
    ),
    "points, no points": (
        "S2DMFlowToTracks",
        {"flow": FLOW, "points": '{"a": 1}', "spacing": 32.0},
        "expected a list of points",
    ),
    "points, NaN": ("S2DMFlowToTracks", {"flow": FLOW, "points": "", "spacing": NAN}, "spacing: "),
    "pose, nothing": ("S2DMPoseToFlow", POSE, "got neither"),
    "pose, NaN": ("S2DMPoseToFlow", {**POSE, "least_confidence": NAN}, "least_confidence: exp"),
    "edit, NaN": ("S2DMEditFlow", {**EDIT, "operation": "loop", "amount": NAN}, "amount: expected"),
    "edit, a crop beyond": ("S2DMEditFlow", {**EDIT, "operation": "crop", "left": 9}, "64x48"),
    "edit, no mask": ("S2DMEditFlow", {**EDIT, "operation": "keep in mask"}, "expected a mask"),
    "edit, more than the memory": (
        "S2DMEditFlow",
        {**EDIT, "operation": "loop", "amount": 1000.0, "flow": ["6", 0]},
        "GiB",
    ),
    "combine, no mask": (
        "S2DMCombineFlow",
        {"first": FLOW, "second": FLOW, "how": "first in the mask"},
        "expected a mask",
    ),
    "pick, beyond the end": ("S2DMPickFlow", {**PICK, "first_frame": 9}, "first_frame up to 3"),
    "warp, nothing": ("S2DMWarpImage", {"flow": FLOW, "holes": "fill"}, "got none"),
    "warp, a mask of another size": (
        "S2DMWarpImage",
        {"flow": FLOW, "image": IMAGE, "mask": MASK, "holes": "black"},
        "a mask as large as the image",
    ),
    "estimate, nothing": ("S2DMEstimateFlow", {"method": "dis"}, "got neither"),
    "visualize, NaN": ("S2DMVisualizeFlow", {"flow": FLOW, "full_colour_at": NAN}, "full_colour"),
    "save, outside of the folder": (
        "S2DMSaveFlow",
        {"flow": FLOW, "filename_prefix": "../../../out", "format": "npz"},
        "outside|output",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_and_the_server_lives(server: ComfyServer, case: str) -> None:
    kind, inputs, message = MISTAKES[case]
    nodes = prompt(kind, **inputs)
    if inputs.get("flow") == ["6", 0]:  # a large one
        size = {"width": 1024, "height": 1024, "frames": 64}
        nodes["6"] = {"class_type": "S2DMCameraFlow", "inputs": {**CAMERA, **size}}
    with pytest.raises(PromptError, match=message) as error:
        server.run(nodes)
    assert error.value.node_type == kind
    assert "Traceback" not in str(error.value)
    server.run(prompt("S2DMPickFlow", **PICK))


@pytest.mark.parametrize(
    "motion",
    [
        "",
        "[]",
        '{"layers": []}',
        '{"layers": [{"tracks": []}, {"region": {"polygon": []}}]}',
        json.dumps([THOUSAND]),
        json.dumps([[point, {**point, "y": 30}] for point in THOUSAND]),
        '[[{"x": -500, "y": 20}, {"x": 900, "y": 20}]]',
    ],
    ids=["empty", "no paths", "no layers", "empty layers", "points", "paths", "out of the picture"],
)
@pytest.mark.parametrize("frames", [1, 3])
def test_odd_drawings_are_drawn(server: ComfyServer, motion: str, frames: int) -> None:
    server.run(prompt("S2DMDrawFlow", **{**DRAW, "motion": motion, "frames": frames}))


def test_a_large_picture(server: ComfyServer) -> None:
    size = {"frames": 2, "width": 4096, "height": 4096}
    nodes = prompt("S2DMDrawFlow", **{**DRAW, **size, "motion": PATH})
    # As large as it is the flow is for other nodes: colours of it would take longer.
    picked = {**EDIT, "flow": ["4", 0], "operation": "crop"}
    nodes["6"] = {"class_type": "S2DMEditFlow", "inputs": picked}
    nodes["5"]["inputs"]["flow"] = ["6", 0]
    server.run(nodes)
