"""`s2dm reproduce`: the chain on puppets in the layouts of UTD-MHAD and MUG, and its parts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("accelerate")
pytest.importorskip("cv2")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from lfdm_files import GENERATOR, region_motion_content, write_bert
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm import cli
from s2dm.data.mug import EXPRESSIONS
from s2dm.data.puppets import render_clip
from s2dm.data.recordings import RecordedClips
from s2dm.evaluation import run as evaluation_run
from s2dm.evaluation.i3d import VideoFeatures
from s2dm.evaluation.modes import Variant
from s2dm.models import S2DMConfig, presets, read_config
from s2dm.reproduction import plan
from s2dm.reproduction.chain import Chain, Step
from s2dm.reproduction.experiment import Experiment, Size
from s2dm.reproduction.paper import TABLE_1, TABLE_2
from s2dm.reproduction.tables import ROWS_2, paper_tables
from s2dm.settings import SettingsError
from s2dm.training.loop import TrainingLoop
from s2dm.video import write_clip

STEPS = [
    "split", "start", "clips", "vae", "stage2", "stage2_independent", "stage1", "evaluate_shared",
    "evaluate_independent", "tables",
]  # fmt: skip


# ---------------------------------------------------------------------- data in their own layouts


def write_mhad(folder: Path) -> Path:
    """Three puppets as subjects of UTD-MHAD: two actions in two trials, as 640x480 videos.

    In a smaller picture of the same shape, in whose window the puppet stands.
    """
    for subject in (1, 2, 3):
        for action in (1, 2):
            for trial in (1, 2):
                clip = render_clip(subject, action, trial, size=60, frames=12)
                frames = torch.full((12, 3, 60, 80), 0.3)
                frames[..., 12:72] = clip.pixels
                part = folder / f"RGB-part{subject}"
                part.mkdir(parents=True, exist_ok=True)
                name = part / f"a{action}_s{subject}_t{trial}_color"
                # The ending that the data set has; write_clip makes others.
                write_clip(name.with_suffix(".mp4"), frames, 15).rename(name.with_suffix(".avi"))
    return folder


def write_mug(folder: Path) -> Path:
    """Three puppets as subjects of MUG, one with sessions: two expressions in two takes."""
    from PIL import Image

    from s2dm.video import to_uint8

    for number, subject in enumerate(("001", "002", "006")):
        for place, expression in enumerate(EXPRESSIONS[:2]):
            for take in range(2):
                clip = render_clip(number, place, take, size=48, frames=12)
                session = f"session{take}" if subject == "002" else ""
                path = folder / "subjects3" / subject / session / expression / f"take{take:03d}"
                path.mkdir(parents=True)
                for index, frame in enumerate(clip.pixels):
                    Image.fromarray(to_uint8(frame)).save(path / f"img_{index:04d}.jpg")
    return folder


WRITERS = {"mhad": write_mhad, "mug": write_mug}


@pytest.fixture(scope="module", params=["mhad", "mug"])
def data(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """In place of Stable Diffusion: the same parts with random weights, as small as they get."""
    folder = tmp_path_factory.mktemp("start")
    config = tiny_config(flow_generator=None, frames=9)
    write_random_checkpoint(folder / "sd.safetensors", config)
    (folder / "i3d").write_text("a stand-in")
    return folder


@pytest.fixture
def tiny(monkeypatch) -> Size:
    """The preset `tiny` with a stage 1 that is tinier yet, and means over patches for I3D."""

    def features(video: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(video, (9, 8, 8)).flatten(1)[:, :6]

    monkeypatch.setattr(
        evaluation_run, "load_i3d", lambda path, device: VideoFeatures(features, "mean", "none")
    )
    network = tiny_config(frames=9).flow_generator
    monkeypatch.setitem(presets.FLOW_GENERATORS, "generator", network)
    size = Size.read("tiny")
    return dataclasses.replace(size, stage1={**size.stage1, "preset": "generator"})


def experiment(data, start, output, size) -> Experiment:
    name, folder = data
    return Experiment(
        name, folder, start / "sd.safetensors", output, size, start / "i3d", cpu=True
    )  # fmt: skip


def results(output: Path) -> dict:
    return json.loads((output / "tables.json").read_text("utf-8"))["results"]


@pytest.mark.slow
def test_the_whole_chain_runs_and_stopped_in_each_step_gives_the_same(
    data, start, tiny, tmp_path, monkeypatch
):
    """Stopped with one of the data sets: a step doesn't know which it is in."""
    whole = experiment(data, start, tmp_path / "whole", tiny)
    assert [step.name for step in whole.chain.steps] == STEPS
    whole.chain.run()
    split = json.loads((whole.output / "split.json").read_text("utf-8"))
    assert len(split["held_out"]) == 2 and len(split["train"]) == 8 and len(split["test"]) == 4
    found = results(whole.output)
    assert {(name, mode) for name, table in found.items() for mode in table} >= set(ROWS_2.values())
    assert all(row["videos"] == 6 for table in found.values() for row in table.values())
    page = (whole.output / "tables.md").read_text("utf-8")
    assert page.count("| 6 |") == 5 and f"{TABLE_1['LFDM'][data[0]]:.2f} | –" in page
    trained = read_config(whole.output / "stage1" / "export.safetensors")
    assert trained.flow_generator is not None and trained.noise_sharing == "shared"
    other = read_config(whole.output / "stage2_independent" / "export.safetensors")
    assert other.noise_sharing == "independent"

    if data[0] != "mhad":
        return
    # Each run of the chain gets one step further, and into the middle of the next one.
    stopped = tmp_path / "stopped"
    (stopped / "cache").mkdir(parents=True)
    shutil.copyfile(whole.words, stopped / "words.toml")
    stops = stop_while_writing(monkeypatch, stopped, "split", "start", "tables")
    step_of_training, make, read = TrainingLoop._step, Variant.make, RecordedClips.pool

    reads: list[int] = []

    def interrupted_read(self: RecordedClips, index: int):
        reads.append(index)
        if len(reads) == 4:
            stops.append(begun(stopped))
            raise KeyboardInterrupt
        return read(self, index)

    def interrupted_step(self: TrainingLoop):
        losses = step_of_training(self)
        if self.progress.step == 0:
            stops.append(begun(stopped))
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    made: list[str] = []

    def interrupted_make(self: Variant, *rest):
        step = begun(stopped)
        made.append(step)
        if made.count(step) == 3:
            stops.append(step)
            raise KeyboardInterrupt
        return make(self, *rest)

    monkeypatch.setattr(RecordedClips, "pool", interrupted_read)
    monkeypatch.setattr(TrainingLoop, "_step", interrupted_step)
    monkeypatch.setattr(Variant, "make", interrupted_make)
    for _ in range(len(STEPS) + 2):
        try:
            experiment(data, start, stopped, tiny).chain.run()
        except KeyboardInterrupt:
            continue
        break
    assert stops == STEPS
    # What was read or made before the stop is there: the one that was under way comes twice.
    assert reads.count(1) == 1
    videos, true = 6, len(split["test"])
    assert made.count("evaluate_shared") == 3 * videos + true + 1
    assert made.count("evaluate_independent") == videos + true + 1
    assert results(stopped) == found
    assert (stopped / "tables.md").read_text("utf-8") == page
    monkeypatch.setattr(Chain, "_expect_done", lambda self, step: pytest.fail("nothing is left"))
    experiment(data, start, stopped, tiny).chain.run()


def begun(output: Path) -> str:
    """The step of a chain that is begun and not done, "" if there is none."""
    marks = [mark for mark in (output / "steps").glob("*.json") if not mark.name.startswith(".")]
    open_ones = [m.stem for m in marks if not json.loads(m.read_text("utf-8"))["done"]]
    assert len(open_ones) < 2
    return "".join(open_ones)


def stop_while_writing(monkeypatch: pytest.MonkeyPatch, output: Path, *steps: str) -> list[str]:
    """Interrupt each of these steps once, when a file of theirs is written and has no name yet.

    Returns the list in which each step then stands.
    """
    stops: list[str] = []
    fsync = os.fsync

    def interrupted(handle: int) -> None:
        step = begun(output)
        if step in steps and step not in stops:
            stops.append(step)
            raise KeyboardInterrupt
        fsync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    return stops


@pytest.mark.slow
def test_lfdms_weights_make_the_flow_of_two_stages(start, tiny, tmp_path, monkeypatch):
    # The importer knows LFDM's diffusion model at its published size alone: a small one comes in
    # as what it becomes.
    flow = tmp_path / "flowdiff.safetensors"
    write_random_checkpoint(flow, S2DMConfig(flow_generator=GENERATOR))
    torch.save(region_motion_content(), tmp_path / "RegionMM.pth")
    files = (flow, tmp_path / "RegionMM.pth", write_bert(tmp_path / "bert"))
    folder = write_mug(tmp_path / "mug")
    made = Experiment(
        "mug", folder, start / "sd.safetensors", tmp_path / "out", tiny, start / "i3d", files,
        cpu=True,
    )  # fmt: skip
    lfdm, *evaluations, tables = [step.name for step in made.chain.steps][-5:]
    assert lfdm == "lfdm" and evaluations[-1] == "evaluate_lfdm" and tables == "tables"
    assert "evaluate_lfdm" in made.plan().text()
    stops = stop_while_writing(monkeypatch, made.output, "lfdm")
    steps = ["split", "start", "clips", "vae", "stage2", "lfdm", "evaluate_lfdm"]
    with pytest.raises(KeyboardInterrupt):
        made.chain.run(steps)
    assert stops == ["lfdm"] and not made.with_lfdm.exists()
    made.chain.run(steps)
    joined = read_config(made.with_lfdm)
    assert joined.flow_generator == GENERATOR and joined.unet is not None
    found = json.loads((made.evaluation("lfdm").output / "results.json").read_text("utf-8"))
    row = found["table"]["two-stage-plain"]
    assert row["videos"] == 6 and "fvd" in row


@pytest.mark.slow
def test_the_command_prints_a_plan_and_does_what_it_says(data, start, tiny, tmp_path, capsys):
    name, folder = data
    command = ["reproduce", name, "--data", folder, "--sd15", start / "sd.safetensors", "--i3d"]
    command += [start / "i3d", "--preset", "tiny", "--cpu", "-o", tmp_path / "out", "--workers", 0]
    command = list(map(str, command))
    assert cli.main([*command, "--plan"]) == 0
    printed = capsys.readouterr().out
    for step in STEPS:
        assert any(line.startswith(step + " ") for line in printed.splitlines())
    assert "hours are left on cpu" in printed and "words.toml" in printed
    assert not (tmp_path / "out" / "steps").exists()
    assert cli.main([*command, "--only", "split", "start"]) == 0
    assert cli.main([*command, "--plan"]) == 0
    done = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " done " in line]
    assert [name for name, _ in done] == ["split", "start"]
    for more, message in (
        (["--only", "tables"], "needs evaluate_shared, evaluate_independent"),
        (["--only", "dance"], "There is no step 'dance'"),
        (["--seed", "1"], "was begun with other settings"),
        (["--preset", "huge"], "known presets: paper, tiny"),
        (["--sd15", "nowhere"], "there is nothing at nowhere"),
    ):
        assert cli.main([*command, *more]) == 1
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the parts


def chain(folder: Path, done: list[str], value: int = 1, fail: str = "") -> Chain:
    def run(name: str) -> None:
        if name == fail:
            raise KeyboardInterrupt
        done.append(name)

    return Chain(
        folder,
        [
            Step("a", "first", lambda: run("a"), {"value": value, "sizes": (1, 2)}),
            Step("b", "second", lambda: run("b"), {}, ("a",)),
            Step("c", "third", lambda: run("c"), {}, ("b",)),
        ],
    )


def test_each_step_is_done_once(tmp_path):
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        chain(tmp_path, done, fail="b").run()
    chain(tmp_path, done).run()
    chain(tmp_path, done).run()
    assert done == ["a", "b", "c"]


def test_steps_are_for_the_settings_they_were_begun_with(tmp_path):
    """Those of what they need, too."""
    done: list[str] = []
    chain(tmp_path, done).run(["a"])
    with pytest.raises(SettingsError, match=r"the step a in .* other settings"):
        chain(tmp_path, done, value=2)
    (tmp_path / "steps" / "a.json").unlink()
    chain(tmp_path, done, value=2).run(["a", "b"])
    (tmp_path / "steps" / "a.json").unlink()
    with pytest.raises(SettingsError, match=r"the step b in .* other settings"):
        chain(tmp_path, done)
    with pytest.raises(SettingsError, match="needs a, which isn't done"):
        chain(tmp_path / "new", done).run(["b"])


def test_tables_have_the_papers_figures_and_ours():
    row = {
        "fvd": 101.5, "fvd_95": [90.0, 110.0], "kvd": 3.25, "videos": 2048,
        "fvd_by_class": {"mean": 200.0, "std": 20.0, "values": {}},
    }  # fmt: skip
    page = paper_tables("mug", {"shared": {"given-flow-plain": row}})
    ours = "101.50 (90.00 to 110.00) | 3.25 | 200.0 ± 20.0 | – | 2048 |"
    assert f"| S2DM, given flow | 95.98 | {ours}" in page
    assert f"| shared | shared | 95.98 | {ours}" in page
    assert "| independent | independent | 130.07 | – | – | – | – | – |" in page
    assert "| VDM | 367.65 | – |" in page
    lfdm = {"two-stage-plain": {**row, "fvd": 202.5}}
    both = paper_tables("mug", {"shared": {"two-stage-plain": row}, "lfdm": lfdm})
    assert "| S2DM, two stages | 111.74 | 202.50 (" in both
    assert "| S2DM, two stages, stage 1 trained here | – | 101.50 (" in both
    assert len(TABLE_1) == 5 and set(TABLE_2) == set(ROWS_2)


def test_work_is_counted_without_data():
    from s2dm.pipelines.modules import build_flow_generator

    lfdm = presets.LFDM.flow_generator
    with torch.device("meta"):
        layer = torch.nn.Conv2d(8, 16, 3, padding=1)
        picture = torch.zeros(2, 8, 10, 10)
        generator = build_flow_generator(dataclasses.replace(lfdm, reference_channels=4))
    assert plan.operations(lambda: layer(picture)) == 2 * 2 * 100 * 8 * 16 * 9
    assert plan.flow_operations(generator, 16) > 1.5 * plan.flow_operations(generator, 8)
    assert plan.matrix_speed(torch.device("cpu"), side=64, seconds=0.01) > 0


def test_an_edited_table_of_words_counts_as_a_setting(data, start, tiny, tmp_path):
    whole = experiment(data, start, tmp_path / "out", tiny)
    whole.chain.run(["split"])
    text = whole.words.read_text("utf-8")
    whole.words.write_text(text.replace('caption = "', 'caption = "Here '), "utf-8")
    with pytest.raises(SettingsError, match="the step split"):
        experiment(data, start, tmp_path / "out", tiny)
