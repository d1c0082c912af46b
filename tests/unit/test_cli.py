"""The command line, run in this process on a tiny checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoint import tiny_config, write_random_checkpoint
from safetensors.torch import load_file

from s2dm import cli
from s2dm.convert import ConversionError, convert
from s2dm.flow import FlowField, load_flow, save_flow
from s2dm.models.checkpoint import load_checkpoint
from s2dm.video import read_clip, write_clip

pytest.importorskip("av")

PROMPT = "A man wearing a red coat and blue jeans is squat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return write_random_checkpoint(path, tiny_config(flow_generator=None))


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
    assert (flow.frames, flow.height, flow.width) == (4, 64, 48)


def test_generate_from_a_flow_follows_its_size_and_length(tmp_path, checkpoint):
    save_flow(tmp_path / "flow.npz", FlowField.zeros(5, 32, 40))
    options = ["--flow", tmp_path / "flow.npz", "--checkpoint", checkpoint, "--steps", 1]
    assert run("generate", PROMPT, *options, "-o", tmp_path / "a") == 0
    assert read_clip(tmp_path / "a")[0].shape == (5, 3, 32, 40)
    assert run("generate", PROMPT, *options, "--frames", 3, "--size", "48x32", "-o",
               tmp_path / "b") == 0  # fmt: skip
    assert read_clip(tmp_path / "b")[0].shape == (3, 3, 32, 48)


def test_same_seed_same_clip_from_file_and_folder(tmp_path, checkpoint):
    save_flow(tmp_path / "flow.npz", FlowField.zeros(2, 32, 32))
    options = ["--flow", tmp_path / "flow.npz", "--steps", 1, "--seed", 3, "--sharing", "mixed"]
    assert run("convert", checkpoint, tmp_path / "folder") == 0
    for source, name in ((checkpoint, "a"), (tmp_path / "folder", "b")):
        run("generate", PROMPT, *options, "--checkpoint", source, "-o", tmp_path / name)
    assert torch.equal(read_clip(tmp_path / "a")[0], read_clip(tmp_path / "b")[0])


def test_errors_are_one_line_without_a_traceback(tmp_path, clip, checkpoint, capsys):
    def fails(expected: str, *arguments: object) -> None:
        assert run(*arguments) == 1
        captured = capsys.readouterr()
        assert expected in captured.err
        assert "Traceback" not in captured.err
        assert captured.err.strip().count("\n") == 0

    base = ("generate", PROMPT, "--checkpoint", checkpoint, "-o", tmp_path / "o.mp4")
    fails("There is no clip", *base, "--clip", tmp_path / "missing.mp4")
    fails("Can't write", "generate", PROMPT, "--clip", clip, "-o", tmp_path / "o.txt")
    fails("There is no checkpoint", "generate", PROMPT, "--clip", clip, "--checkpoint", "none")
    (tmp_path / "bad.safetensors").write_text("no weights")
    fails(
        "expected a safetensors file",
        "generate", PROMPT, "--clip", clip, "--checkpoint", tmp_path / "bad.safetensors",
    )  # fmt: skip
    fails("between 0 and 1", *base, "--clip", clip, "--sharing", "mixed", "--share", "2")
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", PROMPT],  # neither clip nor flow
        ["generate", PROMPT, "--clip", "a.mp4", "--flow", "b.npz"],
        ["generate", PROMPT, "--clip", "a.mp4", "--size", "big"],
        ["generate", PROMPT, "--clip", "a.mp4", "--steps", "0"],
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


def test_a_missing_package_is_named(monkeypatch, clip, capsys):
    monkeypatch.setitem(sys.modules, "s2dm.video", None)
    assert run("generate", PROMPT, "--clip", clip) == 1
    error = capsys.readouterr().err
    assert "s2dm.video" in error and "pip install" in error


def test_stopping_is_not_an_error_with_traceback(monkeypatch, clip, checkpoint, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load_pipeline", stop)
    assert run("generate", PROMPT, "--clip", clip, "--checkpoint", checkpoint) == 130
    assert "Stopped" in capsys.readouterr().err


def test_render_writes_clip_flow_and_caption(tmp_path, capsys):
    folder = tmp_path / "puppets"
    options = ["--pixels", 32, "--frames", 3, "-o", folder]
    code = run("render", "--person", 1, "--action", 2, "--format", "png",
               "--sheet", tmp_path / "sheet.png", *options)  # fmt: skip
    assert code == 0
    frames, _ = read_clip(folder / "person01_action02_take0")
    flow = load_flow(folder / "person01_action02_take0.npz")
    assert frames.shape == (3, 3, 32, 32)
    assert (flow.frames, flow.height, flow.width) == (3, 32, 32)
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


def test_convert_between_file_and_folder(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    first, again = load_file(checkpoint), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    convert(checkpoint, tmp_path / "half.safetensors", half=True)
    assert all(w.dtype == torch.float16 for w in load_file(tmp_path / "half.safetensors").values())


def test_convert_reads_pickled_weights(tmp_path, checkpoint):
    config, _ = load_checkpoint(checkpoint)
    weights = load_file(checkpoint)
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "epoch": 3, "s2dm": json.dumps(config.to_dict())}, pickled)
    convert(pickled, tmp_path / "model.safetensors")
    again, _ = load_checkpoint(tmp_path / "model.safetensors")
    assert again == config
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    # Plain Stable Diffusion weights become a plain file.
    torch.save(weights, tmp_path / "plain.pt")
    convert(tmp_path / "plain.pt", tmp_path / "plain.safetensors", half=True)
    assert load_file(tmp_path / "plain.safetensors").keys() == weights.keys()


class Evil:
    def __reduce__(self):
        return print, ("code of the pickle ran",)


def test_convert_runs_no_code_and_refuses_the_rest(tmp_path, checkpoint, capsys):
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ConversionError, match="not loaded"):
        convert(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert "code of the pickle ran" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "text.ckpt").write_text("hello")
    for source, target, message in (
        ("empty.pt", "out.safetensors", "no weights"),
        ("text.ckpt", "out.safetensors", "could not be read"),
        ("missing.safetensors", "folder", "nothing at"),
        ("empty.pt", "folder", r"\.safetensors"),
        (checkpoint, "out.bin", "Can't write"),
        (".", "out.safetensors", "model_index"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / source, tmp_path / target)
    assert not (tmp_path / "out.safetensors").exists()
