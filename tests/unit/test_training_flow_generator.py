"""Training the flow generator on prepared clips: what a step sees, exact chunks, going on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_clips import write_clips
from random_checkpoint import TINY

from s2dm.data.prepared import PreparedClips
from s2dm.flow import FlowField
from s2dm.models import load_checkpoint, mean_motion
from s2dm.models.presets import FLOW_GENERATORS
from s2dm.settings import SettingsError
from s2dm.training.flow_generator import (
    FlowGeneratorSettings,
    FlowGeneratorTrainer,
    fitted,
    measure,
    new_flow_generator,
    preset_size,
    read_flow_clips,
)
from s2dm.training.trainer import TrainingError

CPU, WIDTH = torch.device("cpu"), 24
SETTINGS = {"steps": 5, "warmup_steps": 2, "clips": 3, "chunk": 2, "save_every": 2}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> PreparedClips:
    return write_clips(tmp_path_factory.mktemp("prepared") / "clips")


def trainer(folder: Path, clips: PreparedClips, /, **settings: Any) -> FlowGeneratorTrainer:
    """A run of a tiny network."""
    options = {name: settings.pop(name) for name in ("resume", "between") if name in settings}
    size = dataclasses.replace(TINY.flow_generator, **settings.pop("network", {}))
    chosen = FlowGeneratorSettings(**{**SETTINGS, **settings})
    texts = torch.randn(len(clips), WIDTH, generator=torch.Generator().manual_seed(2))
    data = read_flow_clips(clips, size.size, 0.5, texts)
    config = fitted(size, data, *measure(data.conditions))
    network = new_flow_generator(config, chosen.seed)
    return FlowGeneratorTrainer(chosen, network, data, clips, CPU, folder, **options)


def test_the_network_is_made_for_the_clips(tmp_path: Path, clips: PreparedClips) -> None:
    config = trainer(tmp_path, clips).network.config
    assert (config.reference_channels, config.text_dim, config.frames) == (4, WIDTH, 4)
    # A square of 12x12 of 32x32 pixels moves by 0, 1, 2 and 3 pixels, a half-frame is 16.
    assert config.displacement_scale == pytest.approx(((1 + 4 + 9) / 3) ** 0.5 / 16, rel=0.15)
    assert config.motion == pytest.approx(6 / 4 * (12 * 12) / 32**2 / 16, rel=0.1)


def test_a_step_sees_flow_frame_and_caption_of_one_clip(
    tmp_path: Path, clips: PreparedClips
) -> None:
    run = trainer(tmp_path, clips)
    batch = run.batch(0)
    config = run.network.config
    assert batch["flow"].shape == batch["noise"].shape == (3, 4, 3, *config.size)
    assert not torch.equal(batch["noise"][:, 0], batch["noise"][:, 1])
    conditions = batch["flow"].clone()
    conditions[:, :, :2] *= config.displacement_scale
    torch.testing.assert_close(batch["motion"], mean_motion(conditions))
    for row in range(3):
        ((clip,),) = (run.data.texts == batch["text"][row]).all(1).nonzero().tolist()
        latents = clips.latents(clip, [0])[0] * 0.5
        torch.testing.assert_close(batch["reference"][row], latents)
        moved = clips.condition(clip, range(4), config.size)[:, :2]
        torch.testing.assert_close(conditions[row, :, :2], moved, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", ["frame", "clip"])
def test_chunks_give_the_gradient_of_the_whole(
    tmp_path: Path, clips: PreparedClips, norm: str
) -> None:
    def gradient(chunk: int) -> torch.Tensor:
        run = trainer(tmp_path / str(chunk), clips, chunk=chunk, network={"norm": norm})
        run.accumulate(run.batch(0))
        return torch.cat([p.grad.flatten() for p in run.network.parameters() if p.grad is not None])

    whole, parts = gradient(3), gradient(2)
    assert (whole - parts).norm() <= 1e-5 * whole.norm()


class StopError(Exception):
    pass


def test_stopped_and_gone_on_it_has_the_losses_of_one_that_never_was(
    tmp_path: Path, clips: PreparedClips
) -> None:
    whole = trainer(tmp_path / "whole", clips)
    whole.run()
    asked: list[int] = []

    def between() -> None:
        asked.append(1)
        if len(asked) == 6:  # in the middle of step 3
            raise StopError

    with pytest.raises(StopError):
        trainer(tmp_path / "run", clips, between=between).run()
    gone_on = trainer(tmp_path / "run", clips)
    assert gone_on.step == 2
    gone_on.run()
    assert gone_on.losses == pytest.approx(whole.losses, rel=1e-6)
    for name, weight in whole.averaged_state("flow_generator").items():
        other = gone_on.averaged_state("flow_generator")[name]
        assert torch.allclose(weight, other, rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_it_learns_and_its_file_holds_the_network_alone(
    tmp_path: Path, clips: PreparedClips
) -> None:
    run = trainer(tmp_path, clips, steps=40, learning_rate=3e-3, ema_decay=0.9)
    run.run()
    assert sum(run.losses[-10:]) < 0.7 * sum(run.losses[:10])
    run.export(tmp_path / "mine.safetensors")
    found = load_checkpoint(tmp_path / "mine.safetensors")
    assert list(found) == ["flow_generator"]
    assert found.config.flow_generator == run.network.config
    assert found.config.resolution == clips.flow_size
    assert clips.key in found.config.data and "3 clips, 40 steps" in found.config.data
    for name, weight in run.averaged_state("flow_generator").items():
        there = found["flow_generator"].state[name].float()
        assert torch.allclose(there, weight, atol=2e-3, rtol=2e-3), name


def test_a_preview_is_a_flow_and_the_weights_stay(tmp_path: Path, clips: PreparedClips) -> None:
    run = trainer(tmp_path, clips)
    run.run()
    before = {name: weight.clone() for name, weight in run.network.state_dict().items()}
    field = run.sample(steps=3)
    assert isinstance(field, FlowField) and (field.num_frames, field.height) == (4, 16)
    assert (field.displacement[0] == 0).all() and field.displacement.isfinite().all()
    picture = run.picture()
    assert picture.shape == (3, 2 * 16, 4 * 16) and picture.isfinite().all()
    after = run.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_size_is_not_gone_on_with(tmp_path: Path, clips: PreparedClips) -> None:
    trainer(tmp_path, clips).run()
    with pytest.raises(TrainingError, match=r"another flow_generator\.model_channels"):
        trainer(tmp_path, clips, network={"model_channels": 32})


def test_a_new_network_is_the_seeds_alone() -> None:
    one, other = (new_flow_generator(TINY.flow_generator, 3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_clips_in_which_nothing_moves_are_refused(clips: PreparedClips) -> None:
    with pytest.raises(SettingsError, match="nothing moves"):
        measure([torch.zeros(4, 3, 8, 8)])


def test_presets() -> None:
    assert preset_size("lfdm").model_channels == 64
    assert set(FLOW_GENERATORS) == {"lfdm", "puppets"}
    with pytest.raises(SettingsError, match=r"lfdm, puppets, got 'sd15'.*lfdm is the size"):
        preset_size("sd15")
