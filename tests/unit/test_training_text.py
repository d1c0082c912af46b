"""The trainer of the text encoder: what a batch asks, what it writes, what it keeps."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from random_checkpoint import tiny_config, write_random_checkpoint
from tiny_training import DATA, stage2_config

from s2dm.models import load_checkpoint, read_config
from s2dm.pipelines.modules import build, build_tokenizer, tokenize
from s2dm.settings import SettingsError, from_dict
from s2dm.training import text
from s2dm.training.loop import step_generator
from s2dm.training.models import load_model
from s2dm.training.run_folder import RunFolder
from s2dm.training.stage2 import build_stage2_task
from s2dm.training.text import TextTrainingConfig, build_text_task, train_text

pytestmark = pytest.mark.usefixtures("tiny_preset")

CPU = torch.device("cpu")


def _config(folder: Path, **settings) -> TextTrainingConfig:
    values = {
        "output": str(folder),
        "preset": "tiny",
        "data": DATA,
        "steps": 3,
        "batch_size": 4,
        "from_start": 4,
        "from_end": 3,
        "mixed_precision": "no",
        "workers": 0,
        "warmup_steps": 1,
        "log_every": 1,
    }
    return from_dict(TextTrainingConfig, {**values, **settings})


def test_the_export_is_a_text_encoder_that_stage_2_takes(tmp_path, vae_file):
    train_text(_config(tmp_path / "text"))
    path = tmp_path / "text" / "export.safetensors"
    made = load_model(path)
    assert list(made) == ["text_encoder"] and made.config.tokenizer["kind"] == "bpe"
    stage2 = stage2_config(tmp_path / "stage2", vae_file, text_encoder=str(path))
    task = build_stage2_task(stage2, CPU)
    encoder = build(made, "text_encoder").state_dict()
    taken = task.model.text_encoder.state_dict()
    assert taken.keys() == encoder.keys()
    assert all(torch.equal(value, taken[key]) for key, value in encoder.items())
    assert task.model_config.tokenizer == made.config.tokenizer


def test_a_run_keeps_its_tokenizer_when_captions_are_added(tmp_path, monkeypatch):
    config = _config(tmp_path)
    train_text(config)
    before = read_config(tmp_path / "export.safetensors")
    monkeypatch.setattr(text, "_captions", lambda *_: ["a circle, mostly round", "a square"])
    train_text(dataclasses.replace(config, steps=4))
    after = read_config(tmp_path / "export.safetensors")
    assert after.tokenizer == before.tokenizer


def test_a_batch_asks_for_the_words_of_its_captions(tmp_path):
    task = build_text_task(_config(tmp_path))
    batch = task.batch(step_generator(0, 0), CPU)
    end = task.end
    for ids, positions, words, weights in zip(
        batch["token_ids"], batch["positions"], batch["words"], batch["weights"], strict=True
    ):
        text = ids[1 : ids.tolist().index(end)].tolist()
        assert positions[0] == len(text) + 1
        assert (ids[positions] == end).all()
        padded = [*text, *[end] * 4][:4]
        assert words[:4].tolist() == padded
        assert words[4:].tolist() == text[::-1][:3]
        assert torch.equal(weights == 1, words != end)
    ends, padding = batch["positions"].T
    assert (padding > ends).any()  # any one of the padding, not the end of the text alone


def test_it_learns_to_tell_captions_apart(tmp_path):
    config = _config(tmp_path, steps=150, learning_rate=3e-3, batch_size=6, ema_decay=0.9)
    train_text(config)
    records = RunFolder(tmp_path).records()
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < 0.3 * losses[0]
    assert records[-1]["read"] > 0.5


def test_states_that_a_unet_reads_stay_near(tmp_path):
    start = write_random_checkpoint(tmp_path / "start.safetensors", tiny_config())
    drifts = []
    for weight in (0.0, 30.0):
        folder = tmp_path / str(weight)
        settings = {"steps": 30, "learning_rate": 1e-3, "ema_decay": 0.5}
        train_text(_config(folder, checkpoint=str(start), keep_weight=weight, **settings))
        drifts.append(_drift(start, folder / "export.safetensors"))
    assert drifts[1] < 0.7 * drifts[0]


def _drift(before: Path, after: Path) -> float:
    ids = tokenize(build_tokenizer(read_config(before)), ["square number 3"])
    with torch.no_grad():
        first, second = (
            build(load_model(path), "text_encoder").eval()(ids).last_hidden_state
            for path in (before, after)
        )
    return float((first - second).norm())


def test_the_other_parts_of_the_checkpoint_stay(tmp_path):
    start = write_random_checkpoint(tmp_path / "start.safetensors", tiny_config())
    train_text(_config(tmp_path / "run", checkpoint=str(start)))
    before = load_checkpoint(start)
    after = load_checkpoint(tmp_path / "run" / "export.safetensors")
    assert set(after) == set(before)
    changed = {
        part
        for part, state in before.states.items()
        if any(not torch.equal(w.half(), after[part].state[key]) for key, w in state.items())
    }
    assert changed == {"text_encoder"}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "stage 2 and stage 1 learned.*export: stage 2, then stage 1"),
        ({"flow_generator": None}, "stage 2 learned.*export: stage 2"),
        ({"flow_generator": None, "unet": None, "flow_adapter": None}, ""),
    ],
)
def test_it_says_who_reads_the_text_encoder_of_a_checkpoint(tmp_path, caplog, parts, said):
    config = dataclasses.replace(tiny_config(), **parts)
    start = write_random_checkpoint(tmp_path / "start.safetensors", config)
    with caplog.at_level("WARNING", logger="s2dm"):
        build_text_task(_config(tmp_path / "run", checkpoint=str(start)))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == bool(said)
    assert all(re.search(said, warning) for warning in warnings)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="keep_weight"):
        _config(tmp_path, keep_weight=1.0)
    start = write_random_checkpoint(
        tmp_path / "start.safetensors",
        tiny_config(text_encoder=None, tokenizer=None, unet=None, flow_generator=None),
    )
    with pytest.raises(SettingsError, match="no text encoder"):
        build_text_task(_config(tmp_path, checkpoint=str(start)))
