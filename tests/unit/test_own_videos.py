"""Videos of one's own: the commands that the documentation gives, with the workers they have."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("accelerate")
pytest.importorskip("cv2")

import cv2
from torch.utils.data import get_worker_info

from s2dm.cli import main
from s2dm.data import DataConfig
from s2dm.models import read_config
from s2dm.training.cache import ClipError, _load, _Prepared, build_clip_cache
from s2dm.video import write_clip

ROOT = Path(__file__).resolve().parents[2]
SIZE, FRAMES = 32, 4


def write_clips(folder: Path) -> Path:
    """The three clips of the documentation: a textured square that moves, another way in each."""
    generator = torch.Generator().manual_seed(0)
    for shift, name in enumerate(("train/wave", "train/squat", "test/throw"), start=1):
        texture = torch.rand(1, 3, 4, 4, generator=generator)
        texture = torch.nn.functional.interpolate(texture, (16, 16))[0]
        frames = torch.full((8, 3, 48, 64), 0.5)
        for index, frame in enumerate(frames):
            frame[:, 16:32, 16 + shift * index : 32 + shift * index] = texture
        path = folder / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, frames, fps=8)
        path.with_suffix(".txt").write_text(f"a square is {path.stem}", encoding="utf-8")
    return folder


def data_of(folder: Path) -> DataConfig:
    return DataConfig(name="videos", size=SIZE, frames=FRAMES, options={"folder": str(folder)})


def run_python(code: str, folder: Path, *arguments: str) -> str:
    """Run a script with the pack on its path, and no longer than ten minutes."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            raise
    assert process.returncode == 0, output
    return output


# The network can't be reached, as for a user without one.
COMMANDS = """
import json, socket, sys

def unreachable(*arguments):
    raise OSError("the network is unreachable")

class Local(socket.socket):
    def connect(self, address):  # workers pass clips on by sockets of this machine
        return super().connect(address) if self.family == socket.AF_UNIX else unreachable()

socket.socket, socket.getaddrinfo = Local, unreachable

from s2dm.cli import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        code = main(arguments)
        if code:
            sys.exit(code)
"""

# What a test can't wait for; all the rest, the workers above all, is as documented.
SMALL = ["steps=2", "threads=1"]
SMALLER = {
    "vae": ["crop=16", "batch_size=2", "whole_frames=0"],
    "text": [],
    "stage2": ["clips=1", "sample_steps=1"],
    "stage1": ["clips=1", "sample_steps=1"],
}


def documented_commands(folder: Path) -> list[list[str]]:
    """The arguments of each `s2dm` of the documentation's block, as a shell makes them."""
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    (block,) = (text for text in re.findall(r"```\n(.*?)```", page, re.S) if "DATA=" in text)
    collect = 's2dm() { printf "%s\\n" "$@" "" >> arguments; }\n'
    subprocess.run(["bash", "-euc", collect + block], cwd=folder, check=True)
    commands = (folder / "arguments").read_text("utf-8").removesuffix("\n\n").split("\n\n")
    return [command.split("\n") for command in commands]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the documentation speaks to a shell")
def test_the_documented_commands_train_on_own_videos_offline(tmp_path):
    write_clips(tmp_path / "clips")
    shutil.copytree(ROOT / "s2dm" / "training" / "configs", tmp_path / "s2dm/training/configs")
    commands = documented_commands(tmp_path)
    assert [command[1] for command in commands] == ["vae", "text", "stage2", "stage1"]
    for command in commands:
        assert not any("workers" in argument for argument in command)
        for setting in (*SMALL, *SMALLER[command[1]]):
            command += ["--set", setting]
    run_python(COMMANDS, tmp_path, json.dumps(commands))
    runs = tmp_path / "runs"
    for name in ("my_vae", "my_text", "my_stage2", "my_stage1"):
        assert json.loads((runs / name / "config.json").read_text("utf-8"))["workers"] == 2
        assert (runs / name / "export.safetensors").exists()
    made = read_config(runs / "my_stage1" / "export.safetensors")
    assert made.data == "My clips" and made.flow_generator is not None
    assert (made.resolution, made.frames) == ((128, 128), 16)


START_METHODS = """
import multiprocessing, sys, time

if __name__ == "__main__":
    import cv2

    from s2dm.training.cache import build_clip_cache
    from s2dm.data import DataConfig
    from s2dm.data import build_dataset

    folder = sys.argv[1]
    data = DataConfig(name="videos", size=32, frames=4, options={"folder": folder})
    cv2.setNumThreads(3)
    captions = []
    for method in sys.argv[2:]:
        multiprocessing.set_start_method(method, force=True)
        build_dataset(data, "test")[0]  # starts OpenCV's threads
        time.sleep(1)  # they fall asleep
        captions += build_clip_cache(method, data, workers=2).captions
        assert cv2.getNumThreads() == 3
    print("; ".join(captions))
"""


@pytest.mark.slow
def test_clips_are_prepared_however_workers_start_and_whatever_ran_before(tmp_path):
    methods = multiprocessing.get_all_start_methods()
    clips = write_clips(tmp_path / "clips")
    output = run_python(START_METHODS, tmp_path, str(clips), *methods)
    assert output.count("a square is squat; a square is wave") == len(methods)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked here")
def test_nothing_is_forked_beside_threads_of_opencv(tmp_path):
    """Whether a fork beside them hangs is a matter of luck; that there are none is not."""
    seen: list[int] | None = []
    os.register_at_fork(before=lambda: seen is not None and seen.append(cv2.getNumThreads()))
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    context = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("fork", force=True)
        build_clip_cache(tmp_path / "cache", data_of(write_clips(tmp_path / "clips")), workers=2)
        after = cv2.getNumThreads()
    finally:
        multiprocessing.set_start_method(context, force=True)
        cv2.setNumThreads(before)
        forked, seen = seen, None
    assert forked == [1, 1] and after == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_is_broken_is_named_in_one_line(tmp_path, workers):
    clips = write_clips(tmp_path / "clips")
    (clips / "train" / "wave.mp4").write_bytes(b"no video")
    with pytest.raises(ClipError) as error:
        build_clip_cache(tmp_path / "cache", data_of(clips), workers=workers)
    message = str(error.value)
    assert re.match(r"Clip 2 of 2 can't be prepared: .*wave\.mp4 is not a video.*\. Exp", message)
    assert "\n" not in message and "Traceback" not in message


def test_the_command_says_it_in_one_line_too(tmp_path, capsys, tiny_preset):
    clips = write_clips(tmp_path / "clips")
    (clips / "train" / "squat.mp4").write_bytes(b"no video")
    data = {"name": "videos", "options": {"folder": str(clips)}, "size": SIZE, "frames": FRAMES}
    code = main(
        ["train", "vae", "--output", str(tmp_path / "run"), "--set", f"data={json.dumps(data)}"]
    )  # fmt: skip
    assert code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "caching" not in line]
    assert len(said) == 1 and said[0].startswith("s2dm train: Clip 1 of 2 can't be prepared: ")


class _Deadly:
    """A clip that takes so much memory that the system ends whoever prepares it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_ended_is_no_traceback_of_the_loader():
    with pytest.raises(ClipError, match=r"process .* was ended .*memory.*--set workers=1") as error:
        list(_load(_Prepared(_Deadly()), [0], workers=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [RuntimeError("a fault of the code"), ZeroDivisionError()])
def test_faults_of_the_code_keep_their_traceback(error):
    class Faulty(_Deadly):
        def __getitem__(self, index: int) -> None:
            raise error

    with pytest.raises(type(error)):
        list(_load(_Prepared(Faulty()), [0], workers=1))
