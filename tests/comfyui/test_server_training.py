"""Training a flow adapter on a running server, from videos: stopped in each way, gone on with."""

import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_install import PACK, prepare_base
from comfyui_server import ComfyServer, PromptError, ServerError
from PIL import Image
from random_checkpoint import write_random_checkpoint

from s2dm.video import read_clip, write_clip

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

CHECKPOINT, STEPS = "random.safetensors", 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a checkpoint and three videos with captions."""
    base = prepare_base(tmp_path_factory.mktemp("training"))
    write_random_checkpoint(base / "models" / "s2dm" / CHECKPOINT)
    frames, fps = read_clip(PACK / "workflows" / "s2dm_example.mp4", 8)
    for name, clip in (("a", frames), ("b", frames.flip(0)), ("c", frames.flip(-1))):
        write_clip(base / "input" / "mine" / f"{name}.mp4", clip, fps)
        (base / "input" / "mine" / f"{name}.txt").write_text("a man in a red shirt is walking")
    return base


@pytest.fixture(scope="module")
def training_server(comfyui: Path, base: Path) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, base, ["--cpu"]) as running:
        yield running


def prompt(name: str, steps: int = STEPS, **inputs: Any) -> dict[str, Any]:
    return {
        "1": {
            "class_type": "S2DMCheckpointLoader",
            "inputs": {"checkpoint": CHECKPOINT, "frames_at_once": 0},
        },
        "2": {
            "class_type": "S2DMPrepareClips",
            "inputs": {
                "vae": ["1", 2], "clip": ["1", 1], "name": "mine", "folder": "mine",
                "captions": "", "width": 64, "height": 64, "frames": 6, "method": "dis",
            },
        },
        "3": {
            "class_type": "S2DMTrainFlowAdapter",
            "inputs": {
                "model": ["1", 0], "clips": ["2", 0], "name": name, "steps": steps,
                "learning_rate": 1e-3, "joining": "channel", "seed": 5, "clips_per_step": 2,
                "frames_per_clip": 3, "frames_at_once": 2, "precision": "auto",
                "gradient_checkpointing": True, "lora_rank": 0, "save_every": 2, "preview_every": 2,
                "resume": True, **inputs,
            },
        },
    }  # fmt: skip


def losses(base: Path, name: str) -> list[float]:
    lines = (base / "output" / "s2dm_training" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_it_trains_from_videos_is_cancelled_killed_and_goes_on(
    training_server: ComfyServer, base: Path
) -> None:
    server, seen, shown = training_server, [], []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == "3":
            seen.append(data["value"])
        if kind == "preview":
            shown.append(Image.open(io.BytesIO(data["image"])).size)

    outputs = server.run(prompt("whole"), on_event=on_event, timeout=900)
    assert seen and seen[-1] == STEPS
    (loss,) = server.files({"3": outputs["3"]})
    width, height = Image.open(loss).size
    # While it trains: four frames of a sampled clip above the loss. Newer versions of ComfyUI
    # drop what comes within 100 ms of another.
    assert 0 < len(shown) <= STEPS // 2
    assert set(shown) == {(width, height + width // 4)}
    assert len(list((base / "output" / "s2dm_clips" / "mine").glob("clip_*"))) == 3
    whole = losses(base, "whole")
    assert len(whole) == STEPS
    info = server.object_info()["S2DMApplyFlowAdapter"]["input"]["required"]["adapter"]
    assert "whole.safetensors" in json.dumps(info), "not listed at once"

    def cancel(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == "3" and data["value"] >= 1:
            server.post("/interrupt", {})

    with pytest.raises(PromptError) as caught:
        server.run(prompt("stopped"), on_event=cancel, timeout=900)
    assert (caught.value.kind, caught.value.node_type) == ("interrupted", "S2DMTrainFlowAdapter")
    made = losses(base, "stopped")
    assert 0 < len(made) < STEPS

    def kill(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data["node"] == "3" and data["value"] > len(made) + 2:
            os.kill(server.pid, signal.SIGKILL)

    with pytest.raises((ServerError, TimeoutError, OSError, RuntimeError)):
        server.run(prompt("stopped"), on_event=kill, timeout=300)
    server.stop()
    server.start()
    server.run(prompt("stopped"), timeout=900)
    assert losses(base, "stopped") == pytest.approx(whole, rel=1e-5)


@pytest.fixture
def disk(base: Path) -> Iterator[Callable[[int], None]]:
    """Gives the folder of the run "full" a disk of so many bytes, or makes it that large."""
    folder = base / "output" / "s2dm_training" / "full"
    folder.mkdir(parents=True)

    def size(count: int) -> None:
        again = "remount," if folder.is_mount() else ""
        mount = ["mount", "-t", "tmpfs", "-o", f"{again}size={count}", "s2dm", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this user can't mount a small disk")

    yield size
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_what_to_do_and_it_goes_on(
    training_server: ComfyServer, base: Path, disk: Callable[[int], None]
) -> None:
    """With room for one state on it: the next one is written beside before it takes its place."""
    training_server.run(prompt("empty"), timeout=900)
    state = (base / "output" / "s2dm_training" / "empty" / "state.safetensors").stat().st_size
    disk(state * 3 // 2)
    with pytest.raises(PromptError, match=r"Train Flow Adapter .*No space left.*Make room"):
        training_server.run(prompt("full"), timeout=900)
    assert 2 <= len(losses(base, "full")) < STEPS
    disk(state * 4)
    training_server.run(prompt("full"), timeout=900)
    assert losses(base, "full") == pytest.approx(losses(base, "empty"), rel=1e-5)


def test_errors_name_the_node_and_the_remedy(training_server: ComfyServer) -> None:
    with pytest.raises(PromptError, match=r"Train Flow Adapter \(S2DM\): .*name of a file"):
        training_server.run(prompt("../away"), timeout=600)
    wrong = prompt("whole", learning_rate=1e-2)
    with pytest.raises(PromptError, match="another learning_rate"):
        training_server.run(wrong, timeout=600)


def test_a_flow_generator_is_trained_listed_and_used(
    training_server: ComfyServer, base: Path
) -> None:
    graph = prompt("unused")
    clip, vae = ["1", 1], ["1", 2]
    train = {
        "clip": clip, "vae": vae, "clips": ["2", 0], "name": "motion", "steps": 2,
        "learning_rate": 1e-3, "preset": "puppets", "seed": 5, "clips_per_step": 2,
        "clips_at_once": 1, "precision": "auto", "save_every": 1, "preview_every": 1,
        "resume": True,
    }  # fmt: skip
    graph["3"] = {"class_type": "S2DMTrainFlowGenerator", "inputs": train}
    outputs = training_server.run(graph, timeout=900)
    assert len(training_server.files({"3": outputs["3"]})) == 1  # the loss
    assert len(losses(base, "motion")) == 2
    info = training_server.object_info()["S2DMFlowGeneratorLoader"]["input"]["required"]["file"]
    assert "motion.safetensors" in json.dumps(info), "not listed at once"

    load = {"file": "motion.safetensors", "clip": clip, "vae": vae}
    generate = {
        "flow_generator": ["2", 0], "reference": ["3", 0], "prompt": "walking", "frames": 6,
        "steps": 2, "cfg": 1.0, "seed": 1, "motion_strength": 0.0, "sampler_name": "dpmpp_2m",
    }  # fmt: skip
    picture = {"width": 64, "height": 64, "batch_size": 1, "color": 255}
    use = {
        "1": graph["1"],
        "2": {"class_type": "S2DMFlowGeneratorLoader", "inputs": load},
        "3": {"class_type": "EmptyImage", "inputs": picture},
        "4": {"class_type": "S2DMGenerateFlow", "inputs": generate},
        "5": {"class_type": "S2DMVisualizeFlow", "inputs": {"flow": ["4", 0], "full_colour_at": 0}},
    }
    shown = training_server.run(use, timeout=600)
    assert len(training_server.files({"5": shown["5"]})) == 6
