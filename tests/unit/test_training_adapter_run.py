"""`s2dm train adapter`: what it writes, and that it goes on."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_training  # noqa: F401 (it registers the squares)
import torch
from processes import run_processes
from random_checkpoint import write_random_checkpoint
from safetensors import safe_open

from s2dm.cli import main
from s2dm.models import load_checkpoint, read_config
from s2dm.settings import SettingsError, from_dict
from s2dm.training import adapter_run
from s2dm.training.adapter_run import AdapterRunConfig, train_adapter
from s2dm.training.flow_adapter import AdapterTrainer, Batch, new_adapter
from s2dm.training.run_folder import RunFolder
from s2dm.training.trainer import TrainingError


def run_config(folder: Path, **settings) -> AdapterRunConfig:
    checkpoint = folder / "base.safetensors"
    if not checkpoint.exists():
        write_random_checkpoint(checkpoint)
    values = {
        "checkpoint": str(checkpoint), "output": str(folder / "run"), "width": 32, "hidden": 32,
        "data": {"name": "squares", "size": 32, "frames": 4}, "steps": 3, "clips": 2, "frames": 2,
        "chunk": 2, "save_every": 2, "warmup_steps": 1, **settings,
    }  # fmt: skip
    return from_dict(AdapterRunConfig, values)


def test_it_writes_an_adapter_alone_with_what_it_was_trained_on(tmp_path: Path) -> None:
    trainer = train_adapter(run_config(tmp_path, sample_every=3))
    path = tmp_path / "run" / "export.safetensors"
    config = read_config(path)
    assert (config.unet, config.flow_generator) == (None, None)
    trained = config.adapter_training
    assert (trained.base, trained.clips, trained.steps) == ("base", 6, 3)
    state = load_checkpoint(path)["flow_adapter"].state
    for name, weight in trainer.averaged_state("adapter").items():
        assert torch.allclose(state[name].float(), weight, atol=2e-3)
    assert (tmp_path / "run" / "loss.png").is_file()
    assert [p.name for p in (tmp_path / "run" / "samples").iterdir()] == ["step_0000003.png"]


@pytest.mark.parametrize("fusion", ["channel", "spatial"])
def test_a_longer_run_goes_on_with_prepared_clips(tmp_path: Path, fusion: str) -> None:
    whole = train_adapter(run_config(tmp_path, fusion=fusion))
    clips = {"clips_folder": str(tmp_path / "run" / "clips"), "fusion": fusion}
    parts = {"output": str(tmp_path / "parts"), "gradient_checkpointing": False, **clips}
    train_adapter(run_config(tmp_path, steps=1, **parts))
    gone_on = train_adapter(run_config(tmp_path, **parts))
    assert gone_on.losses == pytest.approx(whole.losses, rel=1e-5)


class BothParts(AdapterTrainer):
    """One process that makes a step of what two would: the mean of their gradients."""

    def batch(self, step: int) -> list[Batch]:
        parts = []
        for self.process in (1, 0):
            parts.append(super().batch(step))
        return parts

    def accumulate(self, parts: list[Batch]) -> float:
        losses = [super(BothParts, self).accumulate(part) for part in parts]
        for weight in self.adapter.parameters():
            if weight.grad is not None:
                weight.grad /= 2
        return sum(losses) / 2


@pytest.mark.slow
def test_two_processes_learn_from_the_mean_of_their_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real run of two processes, stopped and gone on with; each draws clips of its own."""
    settings = {"steps": 4, "warmup_steps": 1, "learning_rate": 1e-3, "label_dropout": 0.3}
    train_adapter(run_config(tmp_path, steps=1))
    clips = {"clips_folder": str(tmp_path / "run" / "clips")}
    values = dataclasses.asdict(run_config(tmp_path, **settings, **clips))
    values |= {"output": str(tmp_path / "two"), "threads": 1}
    config = tmp_path / "two.json"
    for steps in (2, 4):
        config.write_text(json.dumps({**values, "steps": steps}))
        run_processes(2, "-m", "s2dm.cli", "train", "adapter", "--config", config)
    monkeypatch.setattr(adapter_run, "AdapterTrainer", BothParts)
    one = train_adapter(run_config(tmp_path, output=str(tmp_path / "one"), **settings, **clips))
    two = RunFolder(tmp_path / "two")
    for name in ("loss", "gradient_norm"):
        expected = [record[name] for record in one.folder.records()]
        assert [record[name] for record in two.records()] == pytest.approx(expected, rel=1e-4)
    # Adam makes whole steps of what is rounding alone, so not each weight by itself.
    start = new_adapter(one.adapter.config, 0).state_dict()
    apart = moved = 0.0
    with safe_open(tmp_path / "two" / "state.safetensors", framework="pt") as file:
        for name, weight in one.adapter.state_dict().items():
            there = file.get_tensor(f"weight.adapter.{name}")
            apart += float((there - weight).square().sum())
            moved += float((weight - start[name]).square().sum())
    assert moved > 0 and apart <= 0.01**2 * moved
    assert read_config(two.export).adapter_training.steps == 4


def test_the_base_learns_nothing(tmp_path: Path) -> None:
    trainer = train_adapter(run_config(tmp_path))
    trainer.accumulate(trainer.batch(0))
    unet = trainer.denoiser.predict.__closure__
    modules = [c.cell_contents for c in unet if isinstance(c.cell_contents, torch.nn.Module)]
    assert modules
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_a_lora_learns_beside_the_adapter_and_goes_on(tmp_path: Path) -> None:
    whole = train_adapter(run_config(tmp_path, lora_rank=2, learning_rate=1e-2))
    weights = whole.averaged_state("lora")
    assert all(weights[f"up.{number}"].abs().max() > 0 for number in range(len(weights) // 2))
    with safe_open(tmp_path / "run" / "lora.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
    layer = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0"
    assert state[f"{layer}.lora_up.weight"].shape == (64, 2)
    assert state[f"{layer}.lora_down.weight"].shape == (2, 64)
    assert state[f"{layer}.alpha"] == 2
    data = read_config(tmp_path / "run" / "export.safetensors").data
    assert "LoRA lora.safetensors" in data
    parts = {
        "clips_folder": str(tmp_path / "run" / "clips"), "output": str(tmp_path / "parts"),
        "lora_rank": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    train_adapter(run_config(tmp_path, steps=2, **parts))
    gone_on = train_adapter(run_config(tmp_path, **parts))
    assert gone_on.losses == pytest.approx(whole.losses, rel=1e-5)
    with pytest.raises(TrainingError, match="another lora_rank"):
        train_adapter(run_config(tmp_path, **{**parts, "lora_rank": 0}))


def test_clips_of_another_model_are_refused(tmp_path: Path) -> None:
    from prepared_clips import write_clips

    write_clips(tmp_path / "other", width=48)
    with pytest.raises(SettingsError, match=r"prompts of width 64.*got 4 and 48"):
        train_adapter(run_config(tmp_path, clips_folder=str(tmp_path / "other")))


@pytest.mark.parametrize("wrong", [{"checkpoint": ""}, {"mixed_precision": "fp16"}])
def test_settings_that_do_not_serve_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        run_config(tmp_path, **wrong)


def test_the_command_is_there(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "adapter", "--help"])
    assert "image model that stays as it is" in capsys.readouterr().out
