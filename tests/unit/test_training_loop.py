"""The loop that all trainers share: schedule, averages, records, resuming, sheets."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from processes import run_processes
from tiny_training import stage2_config

from s2dm.models import load_checkpoint
from s2dm.settings import SettingsError
from s2dm.training.config import TrainingConfig
from s2dm.training.ema import EMA
from s2dm.training.loop import Progress, TrainingLoop, learning_rate, step_generator
from s2dm.training.run_folder import RunFolder, measured_once, training_of
from s2dm.training.stage2 import Stage2Task, build_stage2_task, train_stage2

pytestmark = pytest.mark.usefixtures("tiny_preset")


@given(st.integers(0, 99), st.floats(0, 600))
def test_learning_rate_stays_between_its_ends(step, seconds):
    config = TrainingConfig(
        steps=100, max_minutes=10, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=1
    )
    rate = learning_rate(config, Progress(step, seconds))
    assert 0.1 - 1e-9 <= rate <= 1.0
    later = learning_rate(config, Progress(step, seconds + 60))
    assert later <= rate + 1e-9


def test_learning_rate_warms_up_and_anneals_by_time():
    config = TrainingConfig(steps=10**6, max_minutes=10, learning_rate=1.0, warmup_steps=10)
    assert learning_rate(config, Progress(0, 0.0)) == pytest.approx(0.1)
    assert learning_rate(config, Progress(10, 300.0)) == pytest.approx(0.5)
    assert learning_rate(config, Progress(10, 600.0)) == pytest.approx(0.0)
    assert Progress(10, 600.0).fraction(config) == 1.0


def test_ema_follows_and_gives_the_weights_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(20):
        ema.update()
    with ema.applied():
        assert model.weight.item() > 0.95  # a fixed decay of 0.999 would be at 0.02
    assert model.weight.item() == 1.0


def test_ema_leaves_frozen_weights_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert set(EMA(model, 0.9).average) == {"weight"}


def test_step_generator_depends_on_the_place_alone():
    first = torch.rand(4, generator=step_generator(0, 7, 0, 0))
    again = torch.rand(4, generator=step_generator(0, 7, 0, 0))
    other = torch.rand(4, generator=step_generator(0, 8, 0, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_log_forgets_what_is_made_again(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append({"step": step, "loss": 1.0 / step})
    folder.forget_after(2)
    assert [r["step"] for r in folder.records()] == [1, 2]


def test_a_crash_between_two_states_leaves_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    for step in ("first", "second"):
        folder.discard_new_state()
        folder.new_state.mkdir()
        (folder.new_state / "step").write_text(step)
        if step == "second":
            rename = Path.rename
            monkeypatch.setattr(Path, "rename", _failing_on(folder.new_state, rename))
            with pytest.raises(OSError):
                folder.keep_new_state()
            assert (folder.newest_state() / "step").read_text() == "first"
            monkeypatch.setattr(Path, "rename", rename)
        folder.keep_new_state()
        assert (folder.newest_state() / "step").read_text() == step
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "state"}


def _failing_on(path, rename):
    def renamed(self, target):
        if self == path:
            raise OSError("the power is gone")
        return rename(self, target)

    return renamed


def _stop_after(monkeypatch, steps: int, stop) -> None:
    """Call `stop` while the batch of step `steps` is drawn, which that step still ends."""
    original = Stage2Task.batch
    drawn = []

    def batch(self, generator, device):
        drawn.append(1)
        if len(drawn) == steps:
            stop()
        return original(self, generator, device)

    monkeypatch.setattr(Stage2Task, "batch", batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_uninterrupted_one(tmp_path, vae_file, monkeypatch, accumulation):
    settings = {"gradient_accumulation": accumulation, "cache": str(tmp_path / "cache")}
    whole = stage2_config(tmp_path / "whole", vae_file, **settings)
    train_stage2(whole)
    parts = stage2_config(tmp_path / "parts", vae_file, **settings)
    with monkeypatch.context() as patch:
        _stop_after(patch, 2 * accumulation, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_stage2(parts).step == 2
    assert not (tmp_path / "parts" / "export.safetensors").exists()
    assert train_stage2(parts).step == 4
    first, resumed = (
        load_checkpoint(tmp_path / name / "export.safetensors") for name in ("whole", "parts")
    )
    assert set(first) == set(resumed) == {"unet", "text_encoder", "vae", "flow_adapter"}
    for part in first:
        there = resumed[part].state
        assert all(torch.equal(value, there[key]) for key, value in first[part].state.items()), part
    records = [RunFolder(tmp_path / name).records() for name in ("whole", "parts")]
    losses = [[r["loss"] for r in log if "loss" in r] for log in records]
    assert losses[0] == losses[1]


def test_export_only_leaves_the_run_alone(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, steps=2)
    train_stage2(config)
    export = tmp_path / "export.safetensors"
    before = load_file(export)
    export.unlink()
    train_stage2(dataclasses.replace(config, export_only=True, steps=100))
    after = load_file(export)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_export_only_of_a_run_that_is_not_there_is_refused(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, export_only=True)
    with pytest.raises(SettingsError, match="export_only needs a run that was saved"):
        train_stage2(config)
    assert not (tmp_path / "export.safetensors").exists()


@pytest.mark.parametrize(
    "due", [{}, {"sample_every_minutes": 0.0}], ids=["the state at the end", "a sheet before"]
)
def test_a_run_that_diverged_overwrites_nothing(tmp_path, vae_file, due):
    config = stage2_config(tmp_path, vae_file, steps=2)
    train_stage2(config)
    kept = [tmp_path / "export.safetensors", *sorted((tmp_path / "state").iterdir())]
    before = [path.read_bytes() for path in kept]
    further = dataclasses.replace(config, steps=4, log_every=100, gradient_clip=float("nan"), **due)
    with pytest.raises(
        FloatingPointError, match=f"weights are not finite at step {3 if due else 4}"
    ):
        train_stage2(further)
    assert [path.read_bytes() for path in kept] == before


def test_diverged_run_stops(tmp_path, vae_file):
    task = build_stage2_task(stage2_config(tmp_path, vae_file), torch.device("cpu"))
    loop = TrainingLoop(task.config, task)
    loop._collect({"loss": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        loop._write_log()


def test_a_signal_is_not_lost_while_processes_agree(tmp_path, vae_file, monkeypatch):
    agreed = TrainingLoop._agreed

    def interrupted(self, *values):
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self, *values)

    monkeypatch.setattr(TrainingLoop, "_agreed", interrupted)
    assert train_stage2(stage2_config(tmp_path, vae_file, steps=4)).step == 2


TWO_PROCESSES = """
import hashlib, os, time
from pathlib import Path

rank, clock = int(os.environ["RANK"]), time.monotonic
if rank:  # a clock that runs ahead of the other process's
    time.monotonic = lambda: 1000 * clock()

from random_checkpoint import tiny_config
from tiny_training import stage2_config
from s2dm.cli import leave_processes
from s2dm.models import presets
from s2dm.training import loop, stage2

presets.TINY = tiny_config(flow_generator=None, tokenizer=None)
kept = []
prepared = loop.TrainingLoop.__init__
def remember(self, *arguments):
    prepared(self, *arguments)
    kept.append(self)
loop.TrainingLoop.__init__ = remember
progress = stage2.train_stage2(stage2_config(
    Path({run!r}), {vae!r}, steps={steps}, max_minutes=60, sample_every_minutes=60,
    save_every_minutes=1e-6,
))
digest = hashlib.sha256()
for weight in kept[0].accelerator.unwrap_model(kept[0].model).state_dict().values():
    digest.update(weight.numpy().tobytes())
Path({run!r}, f"weights{{rank}}").write_text(f"{{progress.step}} {{digest.hexdigest()}}")
leave_processes()
"""


@pytest.mark.slow
def test_processes_go_by_one_clock(tmp_path, vae_file):
    """They stop, save and anneal together, and one of them prepares the clips."""
    script, run = tmp_path / "train.py", tmp_path / "run"
    for steps in (3, 5):  # the second time the run goes on
        text = TWO_PROCESSES.format(run=str(run), vae=str(vae_file), steps=steps)
        script.write_text(text, encoding="utf-8")
        run_processes(2, script)
        first, second = (run.joinpath(f"weights{rank}").read_text() for rank in range(2))
        assert first == second and first.startswith(f"{steps} ")
    records = RunFolder(run).records()
    assert [record["step"] for record in records if "loss" in record] == [2, 4]


def test_a_line_of_the_log_that_was_cut_short_is_dropped(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, steps=2)
    train_stage2(config)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')
    assert train_stage2(dataclasses.replace(config, steps=4)).step == 4
    assert {record["step"] for record in RunFolder(tmp_path).records()} == {2, 4}


def test_an_export_says_of_which_step_it_is(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, steps=2)
    train_stage2(config)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "sample_error": 0.5}\n')
    train_stage2(dataclasses.replace(config, export_only=True))
    assert training_of(tmp_path / "export.safetensors")[1] == 2


def test_what_was_measured_at_the_start_stays_with_the_run(tmp_path):
    config = TrainingConfig(output=str(tmp_path))
    assert measured_once(config, "scales", lambda: (1.0, 2.0)) == [1.0, 2.0]
    assert measured_once(config, "scales", lambda: (3.0, 4.0)) == [3.0, 4.0]  # nothing trained yet
    (tmp_path / "state").mkdir()
    assert measured_once(config, "scales", lambda: (5.0, 6.0)) == [3.0, 4.0]


def test_accumulated_losses_are_averaged(tmp_path, vae_file):
    """Two micro-steps of a run without learning: the log has the mean of both."""
    folder = tmp_path / "run"
    config = stage2_config(
        folder, vae_file, steps=1, log_every=1, gradient_accumulation=2, learning_rate=0.0
    )
    task = build_stage2_task(config, torch.device("cpu"))
    losses = [
        task.model.train()(task.batch(step_generator(0, 0, micro, 0), torch.device("cpu")))["loss"]
        for micro in (0, 1)
    ]
    TrainingLoop(config, task).run()
    (record,) = (r for r in RunFolder(folder).records() if "loss" in r)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert record["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)


def test_a_run_may_go_on_with_other_accumulation(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, steps=3)
    train_stage2(config)
    further = dataclasses.replace(config, steps=4, gradient_accumulation=2)
    task = build_stage2_task(further, torch.device("cpu"))
    TrainingLoop(further, task).run()
    # Every gradient went into a step: what is left over would be lost at the next stop.
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_the_log_has_the_mean_of_all_processes(tmp_path, vae_file, monkeypatch):
    config = stage2_config(tmp_path, vae_file, steps=1, log_every=1)
    loop = TrainingLoop(config, build_stage2_task(config, torch.device("cpu")))
    asked = []

    def reduce(value, how):  # as if the other process had drawn batches of loss 0
        asked.append(how)
        return value / 2

    whole = dataclasses.replace(config, output=str(tmp_path / "alone"))
    train_stage2(whole)
    monkeypatch.setattr(loop.accelerator, "reduce", reduce)
    loop.run()
    one, both = (RunFolder(c.output).records()[0]["loss"] for c in (whole, config))
    assert both == pytest.approx(one / 2, rel=1e-4)
    assert set(asked) == {"mean"}
