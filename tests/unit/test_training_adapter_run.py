"""`s2dm train adapter`: what it writes, and that it goes on."""

from pathlib import Path

import pytest
import tiny_training  # noqa: F401 (it registers the squares)
import torch
from random_checkpoint import write_random_checkpoint

from s2dm.cli import main
from s2dm.models import load_checkpoint, read_config
from s2dm.settings import SettingsError, from_dict
from s2dm.training.adapter_run import AdapterRunConfig, train_adapter


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


def test_the_base_learns_nothing(tmp_path: Path) -> None:
    trainer = train_adapter(run_config(tmp_path))
    trainer.accumulate(trainer.batch(0))
    unet = trainer.denoiser.predict.__closure__
    modules = [c.cell_contents for c in unet if isinstance(c.cell_contents, torch.nn.Module)]
    assert modules
    assert all(p.grad is None for module in modules for p in module.parameters())


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
