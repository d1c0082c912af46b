"""The server harness itself: prompts run, errors come back, and the server lives on."""

from pathlib import Path

import pytest
from comfyui_graph import WorkflowError, to_prompt
from comfyui_server import ComfyServer, PromptError

pytestmark = pytest.mark.comfyui


def picture(width: int = 32, prefix: str = "harness") -> dict:
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": width, "height": 16, "batch_size": 2, "color": 255},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def test_a_prompt_writes_its_files_and_reports_progress(server: ComfyServer) -> None:
    events = []
    outputs = server.run(picture(), on_event=lambda kind, _: events.append(kind))
    files = server.files(outputs)
    assert len(files) == 2
    assert all(file.is_file() and server.base in file.parents for file in files)
    assert "executing" in events and events[-1] == "execution_success"


def test_a_prompt_the_server_refuses_says_which_node(server: ComfyServer) -> None:
    with pytest.raises(PromptError, match="EmptyImage") as caught:
        server.run(picture(width=-5))
    assert "1" in caught.value.node_errors


def test_the_server_goes_on_after_a_node_fails(server: ComfyServer) -> None:
    (server.input / "broken.mp4").write_bytes(b"this is no video")
    broken = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": "broken.mp4"}},
        "2": {"class_type": "GetVideoComponents", "inputs": {"video": ["1", 0]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    with pytest.raises(PromptError) as caught:
        server.run(broken)
    assert caught.value.node_type in ("LoadVideo", "GetVideoComponents")
    assert server.alive
    assert server.files(server.run(picture(prefix="afterwards")))


def test_a_ui_workflow_becomes_the_prompt_it_shows(server: ComfyServer, tmp_path: Path) -> None:
    """Widgets by position, a seed's extra widget, links, a note, a muted and a bypassed node."""
    workflow = {
        "nodes": [
            {"id": 1, "type": "EmptyImage", "widgets_values": [32, 16, 2, 255]},
            {
                "id": 2,
                "type": "ImageInvert",
                "mode": 4,
                "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
            },
            {
                "id": 3,
                "type": "SaveImage",
                "title": "Save",
                "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
                "widgets_values": ["ui"],
            },
            {"id": 4, "type": "MarkdownNote", "widgets_values": ["a note"]},
            {"id": 5, "type": "EmptyImage", "mode": 2, "widgets_values": [32, 16, 2, 255]},
            {"id": 6, "type": "KSampler", "widgets_values": [9, "fixed", 20, 7.5, "ddim"]},
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    }
    prompt = to_prompt(workflow, server.object_info())
    assert prompt["1"]["inputs"] == {"width": 32, "height": 16, "batch_size": 2, "color": 255}
    assert prompt["3"]["inputs"] == {"images": ["1", 0], "filename_prefix": "ui"}
    sampler = {"seed": 9, "steps": 20, "cfg": 7.5, "sampler_name": "ddim"}
    assert prompt["6"]["inputs"].items() >= sampler.items()
    assert prompt["6"]["inputs"]["denoise"] == 1  # not in the file: the widget's default
    assert set(prompt) == {"1", "3", "6"}
    assert server.run({"1": prompt["1"], "3": prompt["3"]})


def test_choices_that_bring_widgets_of_their_own_are_kept(server: ComfyServer) -> None:
    """Save Video: a file of an older ComfyUI opens in newer ones, where the codec hangs on the
    format, as the interface opens it."""
    workflow = {
        "nodes": [
            {"id": 1, "type": "EmptyImage", "widgets_values": [32, 16, 2, 255]},
            {
                "id": 2,
                "type": "CreateVideo",
                "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
                "widgets_values": [8],
            },
            {
                "id": 3,
                "type": "SaveVideo",
                "inputs": [{"name": "video", "type": "VIDEO", "link": 2}],
                "widgets_values": ["choices", "mp4", "h264"],
            },
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "VIDEO"]],
    }
    schemas = server.object_info()
    dynamic = schemas["SaveVideo"]["input"]["required"]["format"][0] == "COMFY_DYNAMICCOMBO_V3"
    prompt = to_prompt(workflow, schemas)
    saved = prompt["3"]["inputs"]
    assert (saved["format"], saved["format.codec" if dynamic else "codec"]) == ("mp4", "h264")
    (file,) = server.files(server.run(prompt))
    assert file.name.startswith("choices") and file.suffix == ".mp4"


def test_a_workflow_with_an_unknown_node_is_refused() -> None:
    workflow = {"nodes": [{"id": 1, "type": "Unknown"}], "links": []}
    with pytest.raises(WorkflowError, match="Unknown, which is not installed"):
        to_prompt(workflow, {})
