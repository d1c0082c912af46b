"""The comparison of joinings: one frozen image model, adapters that differ in fusion alone."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from compare import relative
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm.models import load_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import joining
import joining_lora
import report


@pytest.fixture
def options(tmp_path, monkeypatch):
    config = tiny_config(flow_generator=None)
    monkeypatch.setattr(joining, "DEFAULT_CHECKPOINT", tmp_path / "bundled.safetensors")
    write_random_checkpoint(joining.DEFAULT_CHECKPOINT, config)
    monkeypatch.setattr(joining, "BASE_STEPS", 2)
    joining.register_dataset("puppets-part", joining._part)
    usual = joining.settings

    def small(*arguments, **changes):
        made = usual(*arguments, **changes)
        data = dataclasses.replace(made.data, size=32, frames=3)
        return dataclasses.replace(made, data=data, clips=2, sample_frames=2, sample_steps=1)

    monkeypatch.setattr(joining, "settings", small)
    return argparse.Namespace(
        runs=tmp_path / "runs", threads=1, workers=0, training_clips=2, steps=2, learning_rate=1e-2
    )


@pytest.mark.slow
def test_the_image_model_stays_and_the_adapter_learns(options, monkeypatch):
    base = joining.train_base(options)
    image_model = load_checkpoint(base)
    assert "flow_adapter" not in image_model
    bundled = load_checkpoint(joining.DEFAULT_CHECKPOINT)
    changed = {
        part: not all(torch.equal(w.half(), state[k]) for k, w in bundled[part].state.items())
        for part, state in image_model.states.items()
    }
    assert changed == {"unet": True, "text_encoder": False, "vae": False}
    for fusion in ("channel", "spatial"):
        made = load_checkpoint(joining.train_adapter(options, base, fusion))
        assert made.config.flow_adapter.fusion == fusion
        for part in ("unet", "text_encoder", "vae"):
            for name, weight in image_model[part].state.items():
                assert torch.equal(weight, made[part].state[name])
        state = made["flow_adapter"].state
        assert all(state[name].any() for name in state if ".to_" in name)
    # What is there is not trained again.
    monkeypatch.setattr(joining, "run_training", None)
    assert joining.train_base(options) == base
    joining.train_adapter(options, base, "spatial")


@pytest.mark.slow
def test_a_lora_becomes_a_part_of_the_exported_unet_alone(options):
    base = joining.train_base(options)
    start = joining.train_adapter(options, base, "channel")
    told = argparse.Namespace(**vars(options), fusion="channel", further=2)
    without, beside = (load_checkpoint(joining_lora.go_on(told, base, start, n)) for n in (0, 2))
    image_model, adapter = load_checkpoint(base), load_checkpoint(start)["flow_adapter"].state
    for name, weight in image_model["unet"].state.items():
        assert torch.equal(weight.half(), without["unet"].state[name])
        attention = any(f".attn{n}.to_" in name for n in (1, 2)) and name.endswith(".weight")
        assert torch.equal(weight.half(), beside["unet"].state[name]) != attention, name
    for made in (without, beside):
        learned = made["flow_adapter"].state
        moved = {name: relative(learned[name].float(), adapter[name]) for name in adapter}
        assert max(moved.values()) > 1e-3  # than which half precision changes less
        assert max(moved.values()) < 0.1, "not gone on with"


def test_rows_are_called_after_the_file_that_they_measure(monkeypatch, tmp_path):
    def measured(config):
        table = {str(variant): {"file": config.checkpoint.name} for variant in config.variants}
        return {"table": table, "protocol": {}}

    monkeypatch.setattr(joining_lora, "evaluate", measured)
    files = {rank: tmp_path / f"{rank}.safetensors" for rank in (0, 8)}
    for path in files.values():
        path.write_bytes(path.name.encode())
    options = argparse.Namespace(
        runs=tmp_path, frames=16, clips=24, sampling_steps=20, i3d=None, cpu=True, steps=1500,
        further=200, fusion="channel", training_clips=600,
    )  # fmt: skip
    result = joining_lora.measure(options, files[0], files)
    assert {name: row["file"] for name, row in result["table"].items()} == {
        "adapter alone, plain": "0.safetensors",
        "adapter alone, anchored": "0.safetensors",
        "with a LoRA of rank 8, plain": "8.safetensors",
        "with a LoRA of rank 8, anchored": "8.safetensors",
    }
    hashes = [joining_lora.file_hash(path) for path in files.values()]
    told = f"adapter alone {hashes[0]}, with a LoRA of rank 8 {hashes[1]}"
    assert result["protocol"]["checkpoint"] == f"adapter {hashes[0]}, {told}"


def test_the_page_shows_figures_and_budgets():
    figures = {"clips": 24, "flow_error": 0.5, "flow_error_95": [0.4, 0.6]}
    run = {"parameters": 2_000_000, "learning_rate": 1e-3, "steps": 300}
    result = {
        "protocol": {"command": "python benchmarks/joining.py"},
        "trainings": {"spatial": run},
        "table": {"spatial, plain": figures, "zero-flow": figures},
    }
    page = report.SECTIONS["joining"](result)
    assert "| spatial, plain | 24 | 0.50 (0.40 to 0.60) |" in page
    assert "| spatial | 2.00 million | 0.001 | 300 |" in page
    assert "generated, zero flow" in page
