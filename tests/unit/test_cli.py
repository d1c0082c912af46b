"""The command line, run in this process on a tiny checkpoint."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm import cli
from s2dm.cli import generate
from s2dm.flow import FlowField, load_flow, save_flow
from s2dm.models import FLOW_SAMPLERS, SamplingConfig, read_config
from s2dm.sector import NOISE_SHARING
from s2dm.video import read_clip, write_clip

pytest.importorskip("av")

PROMPT = "A man wearing a red coat and blue jeans is squat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return write_random_checkpoint(path, tiny_config(flow_generator=None))


@pytest.fixture(scope="module")
def both_stages(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("both") / "both.safetensors")


@pytest.fixture
def clip(tmp_path) -> Path:
    frames = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    frames = torch.nn.functional.avg_pool2d(frames, 5, 1, 2)
    moving = torch.cat([frames.roll(2 * i, dims=3) for i in range(6)])
    return write_clip(tmp_path / "clip.mp4", moving, fps=12)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out"])
def test_generate_from_a_clip(tmp_path, clip, checkpoint, capsys, name):
    out = tmp_path / "made" / name
    code = run(
        "generate", PROMPT, "--clip", clip, "-o", out, "--checkpoint", checkpoint,
        "--steps", 1, "--device", "cpu", "--save-flow", tmp_path / "flow.npz",
    )  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out.strip() == str(out)
    frames, fps = read_clip(out)
    assert frames.shape == (4, 3, 64, 48)  # the checkpoint's frames and resolution
    if name == "out.mp4":
        assert fps == pytest.approx(12 * 4 / 6, rel=0.01)
    flow = load_flow(tmp_path / "flow.npz")
    assert (flow.num_frames, flow.height, flow.width) == (4, 64, 48)


def test_generate_from_a_flow_follows_its_size_and_length(tmp_path, checkpoint):
    save_flow(tmp_path / "flow.npz", FlowField.zeros(5, 32, 40))
    options = ["--flow", tmp_path / "flow.npz", "--checkpoint", checkpoint, "--steps", 1]
    assert run("generate", PROMPT, *options, "-o", tmp_path / "a") == 0
    assert read_clip(tmp_path / "a")[0].shape == (5, 3, 32, 40)
    assert run("generate", PROMPT, *options, "--frames", 3, "--size", "48x32", "-o",
               tmp_path / "b") == 0  # fmt: skip
    assert read_clip(tmp_path / "b")[0].shape == (3, 3, 32, 48)


def test_generate_from_pose(tmp_path, checkpoint, capsys):
    """Of OpenPose's files, which need the size of their picture, and of one file that tells it."""
    (tmp_path / "pose").mkdir()
    for number in range(3):
        person = [v for k in range(18) for v in (4 + 2 * number + k % 3 * 12, 4 + k // 3 * 4, 1)]
        frame = json.dumps({"people": [{"pose_keypoints_2d": person}]})
        (tmp_path / "pose" / f"a_{number:012}_keypoints.json").write_text(frame, "utf-8")
    base = ["generate", PROMPT, "--checkpoint", checkpoint, "--steps", 1]
    options = [*base, "--pose", tmp_path / "pose", "--save-flow", tmp_path / "flow.npz"]
    assert run(*options, "--size", "40x32", "-o", tmp_path / "a") == 0
    assert read_clip(tmp_path / "a")[0].shape == (3, 3, 32, 40)
    assert load_flow(tmp_path / "flow.npz").magnitude()[2].max() == pytest.approx(4, abs=1e-3)
    assert run(*options, "-o", tmp_path / "b") == 1
    assert "Set width and height" in capsys.readouterr().err
    whole = {"people": [{"pose_keypoints_2d": person}], "canvas_width": 40, "canvas_height": 32}
    (tmp_path / "pose.json").write_text(json.dumps([whole] * 4), "utf-8")
    assert run(*base, "--pose", tmp_path / "pose.json", "-o", tmp_path / "c") == 0
    assert read_clip(tmp_path / "c")[0].shape == (4, 3, 32, 40)


def test_generate_from_a_prompt_alone(tmp_path, both_stages, capsys):
    base = ["generate", PROMPT, "--checkpoint", both_stages, "--steps", 1, "--flow-steps", 1]
    assert run(*base, "-o", tmp_path / "a.mp4", "--save-flow", tmp_path / "a.npz") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.mp4")
    frames, fps = read_clip(tmp_path / "a.mp4")
    assert frames.shape == (4, 3, 64, 48)  # the frames of stage 1, the checkpoint's resolution
    assert fps == pytest.approx(8)
    first = load_flow(tmp_path / "a.npz")
    assert (first.num_frames, first.height, first.width) == (4, 64, 48)
    assert first.magnitude().max() > 0

    assert run(*base, "--frames", 6, "--size", "24x32", "-o", tmp_path / "b") == 0
    assert read_clip(tmp_path / "b")[0].shape == (6, 3, 32, 24)

    image = tmp_path / "a picture.png"
    Image.new("RGB", (100, 80), (200, 30, 60)).save(image)
    for change in (["--motion-strength", 3], ["--reference", image], ["--flow-steps", 2]):
        assert run(*base, *change, "-o", tmp_path / "c", "--save-flow", tmp_path / "c.npz") == 0
        assert not torch.equal(load_flow(tmp_path / "c.npz").displacement, first.displacement)


def test_a_checkpoint_of_both_stages_follows_a_clip_too(tmp_path, clip, both_stages, capsys):
    assert run("convert", both_stages, tmp_path / "folder") == 0
    for source, name in ((both_stages, "a"), (tmp_path / "folder", "b")):
        for motion in (["--clip", clip], []):
            capsys.readouterr()
            code = run("generate", PROMPT, *motion, "--checkpoint", source, "--steps", 1,
                       "-o", tmp_path / f"{name}{len(motion)}")  # fmt: skip
            assert code == 0
            assert "flow_generator" not in capsys.readouterr().err  # no warning of a part unused
    for count in (0, 2):
        first, second = (read_clip(tmp_path / f"{name}{count}")[0] for name in "ab")
        assert (first - second).abs().max() < 1.5 / 255


def test_same_seed_same_clip_from_file_and_folder(tmp_path, checkpoint):
    save_flow(tmp_path / "flow.npz", FlowField.zeros(2, 32, 32))
    options = ["--flow", tmp_path / "flow.npz", "--steps", 1, "--seed", 3, "--sharing", "mixed"]
    assert run("convert", checkpoint, tmp_path / "folder") == 0
    for source, name in ((checkpoint, "a"), (tmp_path / "folder", "b")):
        run("generate", PROMPT, *options, "--checkpoint", source, "-o", tmp_path / name)
    assert torch.equal(read_clip(tmp_path / "a")[0], read_clip(tmp_path / "b")[0])


def test_a_clip_is_sampled_as_the_checkpoint_recommends(tmp_path, both_stages):
    told = tmp_path / "told.safetensors"
    wanted = ["--steps", 1, "--guidance", 2, "--flow-guidance", 1, "--flow-start", 1]
    wanted.append("--key-frame")
    assert run("convert", both_stages, told, *wanted) == 0
    assert read_config(told).sampling == SamplingConfig(1, 2, 1, 1, key_frame=True)
    save_flow(tmp_path / "flow.npz", FlowField.zeros(2, 32, 32))
    for motion in ([], ["--flow", tmp_path / "flow.npz"]):
        clips = []
        others = ([], ["--guidance", 5], ["--flow-start", 0])
        for source, options in ((both_stages, wanted), *((told, other) for other in others)):
            out = tmp_path / f"{len(motion)}{len(clips)}"
            common = ["--flow-steps", 1, "--frames", 2] if not motion else motion
            assert run("generate", PROMPT, "--checkpoint", source, *common, *options,
                       "-o", out) == 0  # fmt: skip
            clips.append(read_clip(out)[0])
        assert torch.equal(clips[0], clips[1])
        for other in clips[2:]:  # the control: what is given shows
            assert not torch.equal(clips[0], other)


def test_errors_are_one_line_without_a_traceback(
    tmp_path, clip, checkpoint, both_stages, capsys, monkeypatch
):
    def fails(expected: str, *arguments: object) -> None:
        assert run(*arguments) == 1
        captured = capsys.readouterr()
        assert expected in captured.err
        assert "Traceback" not in captured.err
        assert captured.err.strip().count("\n") == 0

    base = ("generate", PROMPT, "--checkpoint", checkpoint, "-o", tmp_path / "o.mp4")
    fails("There is no clip", *base, "--clip", tmp_path / "missing.mp4")
    fails("Can't write", "generate", PROMPT, "--clip", clip, "-o", tmp_path / "o.txt")
    fails("ends in .npz", *base, "--clip", clip, "--save-flow", tmp_path / "o.flo")
    fails("There is no checkpoint", "generate", PROMPT, "--clip", clip, "--checkpoint", "none")
    (tmp_path / "bad.safetensors").write_text("no weights")
    fails(
        "expected a safetensors file",
        "generate", PROMPT, "--clip", clip, "--checkpoint", tmp_path / "bad.safetensors",
    )  # fmt: skip
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    fails("holds other files", "generate", PROMPT, "--clip", clip, "-o", taken)
    with monkeypatch.context() as patch:
        patch.chdir(taken)
        fails("holds other files", "generate", PROMPT, "--clip", clip, "-o", ".")
    letter = taken / "letter.txt"
    fails("is a file", "generate", PROMPT, "--clip", clip, "-o", letter / "deep" / "o.mp4")
    fails("--device nonsense", *base, "--clip", clip, "--device", "nonsense")
    fails("validation_split=train", "evaluate", "--checkpoint", checkpoint, "--data", "split=train")
    fails("from 0 to 1, got 2", *base, "--clip", clip, "--sharing", "mixed", "--share", "2")
    fails("Choose a checkpoint with both, or give the motion of a clip", *base)
    for option in ("--motion-strength", "--flow-steps"):
        fails(f"{option} is for motion that is made from", *base, "--clip", clip, option, "1")
    base = ("generate", PROMPT, "--checkpoint", both_stages, "-o", tmp_path / "o.mp4")
    fails("1 to 64 frames, got 65", *base, "--frames", 65)
    fails("motion_strength: expected a number from 0", *base, "--motion-strength", -1)
    fails("There is no image", *base, "--reference", tmp_path / "missing.png")
    fails("not an image", *base, "--reference", tmp_path / "bad.safetensors")
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", PROMPT, "--flow-steps", "0"],
        ["generate", PROMPT, "--clip", "a.mp4", "--flow", "b.npz"],
        ["generate", PROMPT, "--clip", "a.mp4", "--size", "big"],
        ["generate", PROMPT, "--clip", "a.mp4", "--steps", "0"],
        ["generate", PROMPT, "--guidance", "nan"],
        ["generate", PROMPT, "--fps", "0"],
        ["train"],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: s2dm" in capsys.readouterr().err


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["generate", "--help"], ["train", "vae", "-h"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert "s2dm" in capsys.readouterr().out


def test_nothing_heavy_is_imported_before_a_command_needs_it():
    heavy = ("torch", "numpy", "diffusers", "transformers", "PIL", "av", "cv2")
    code = (
        "import sys, s2dm.cli as cli\n"
        "try: cli.main(['generate', '--help'])\n"
        f"finally: print('loaded:', *(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: s2dm generate" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "s2dm.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("s2dm ")


def test_a_missing_package_is_named(monkeypatch, clip, capsys):
    monkeypatch.setitem(sys.modules, "s2dm.video", None)
    assert run("generate", PROMPT, "--clip", clip) == 1
    error = capsys.readouterr().err
    assert "s2dm.video" in error and "pip install" in error


def test_stopping_is_not_an_error_with_traceback(monkeypatch, clip, checkpoint, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_load_pipeline", stop)
    assert run("generate", PROMPT, "--clip", clip, "--checkpoint", checkpoint) == 130
    assert "Stopped" in capsys.readouterr().err


def test_a_command_leaves_the_group_of_its_processes(tmp_path):
    puppet = ("render", "--action", 2, "--person", 1, "--pixels", 32, "--frames", 2, "-o", tmp_path)
    missing = ("convert", tmp_path / "missing", tmp_path / "out")
    for code, command in enumerate((puppet, missing)):
        store = torch.distributed.FileStore(str(tmp_path / f"store{code}"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        assert run(*command) == code
        assert not torch.distributed.is_initialized()


def test_render_writes_clip_flow_and_caption(tmp_path, capsys):
    folder = tmp_path / "puppets"
    options = ["--pixels", 32, "--frames", 3, "-o", folder]
    code = run("render", "--person", 1, "--action", 2, "--format", "png",
               "--sheet", tmp_path / "sheet.png", *options)  # fmt: skip
    assert code == 0
    frames, _ = read_clip(folder / "person01_action02_take0")
    flow = load_flow(folder / "person01_action02_take0.npz")
    assert frames.shape == (3, 3, 32, 32)
    assert (flow.num_frames, flow.height, flow.width) == (3, 32, 32)
    assert (folder / "person01_action02_take0.txt").read_text().strip()
    assert (tmp_path / "sheet.png").exists()
    assert run("render", "--clips", 2, *options) == 0
    assert len(list(folder.glob("*.mp4"))) == 2


def test_render_refuses_what_does_not_exist(tmp_path, capsys):
    for arguments in (
        ["--person", 1],
        ["--person", 10_000, "--action", 0],
        ["--person", 1, "--action", "moonwalk"],
    ):
        assert run("render", "-o", tmp_path / "p", *arguments) == 1
    assert "moonwalk" in capsys.readouterr().err


def test_what_can_be_chosen_is_what_the_library_knows():
    """The parsers don't import it, because it is heavy."""
    commands = argparse.ArgumentParser().add_subparsers()
    generate.add_to(commands)
    choices = {action.dest: action.choices for action in commands.choices["generate"]._actions}
    assert choices["sharing"] == NOISE_SHARING
    assert choices["flow_sampler"] == FLOW_SAMPLERS
