"""Generate Flow on a running server: what it reports, cancel, and its errors."""

from typing import Any

import pytest
from comfyui_server import ComfyServer, PromptError

pytestmark = pytest.mark.comfyui


def generate(checkpoint: str, **inputs: Any) -> dict[str, Any]:
    """A prompt that makes flow for a plain picture, and shows it."""
    return {
        "1": {
            "class_type": "S2DMCheckpointLoader",
            "inputs": {"checkpoint": checkpoint, "frames_at_once": 0},
        },
        "2": {
            "class_type": "EmptyImage",
            "inputs": {"width": 48, "height": 40, "batch_size": 1, "color": 0x336699},
        },
        "3": {
            "class_type": "S2DMGenerateFlow",
            "inputs": {
                "flow_generator": ["1", 3],
                "reference": ["2", 0],
                "prompt": "a man in a red shirt is walking",
                "frames": 16,
                "steps": 6,
                "cfg": 2.0,
                "seed": 1,
                "motion_strength": 1.0,
                "sampler_name": "dpmpp_2m",
                **inputs,
            },
        },
        "4": {"class_type": "S2DMVisualizeFlow", "inputs": {"flow": ["3", 0], "full_colour_at": 0}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }


def test_progress_is_shown_and_every_frame_comes_out(server: ComfyServer) -> None:
    steps = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == "3":
            steps.append((data["value"], data["max"]))

    files = server.files(server.run(generate("random.safetensors"), on_event=on_event))
    # from 0.33 on ComfyUI itself drops updates that follow each other within 100 ms
    assert steps == sorted(set(steps))
    assert steps[0] == (1, 6)
    assert steps[-1] == (6, 6)
    assert len(files) == 2 * 16  # as Visualize Flow shows them, and in the preview after it


def test_cancel_stops_it_and_the_server_goes_on(server: ComfyServer) -> None:
    seen = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == "3":
            seen.append(data["value"])
            if len(seen) == 1:
                server.post("/interrupt", {})

    with pytest.raises(PromptError) as caught:
        server.run(generate("random.safetensors", steps=1000, seed=2), on_event=on_event)
    assert (caught.value.kind, caught.value.node_type) == ("interrupted", "S2DMGenerateFlow")
    assert max(seen) < 1000
    assert server.files(server.run(generate("random.safetensors", seed=3)))


@pytest.mark.parametrize("frames", [1, 65])
def test_a_number_of_frames_out_of_range_is_refused(server: ComfyServer, frames: int) -> None:
    with pytest.raises(PromptError, match=r"S2DMGenerateFlow.*(?i:value|frames)"):
        server.run(generate("random.safetensors", frames=frames))


def test_a_number_that_comes_through_a_link_is_refused_too(server: ComfyServer) -> None:
    """Core checks the range of widgets alone."""
    prompt = generate("random.safetensors", frames=["6", 0])
    prompt["6"] = {"class_type": "PrimitiveInt", "inputs": {"value": 1}}
    with pytest.raises(
        PromptError, match=r"Generate Flow \(S2DM\): expected at least 2 frames, got 1"
    ):
        server.run(prompt)
