"""The trainer of stage 1: what a batch holds, what learns, what it writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from prepared_clips import write_clips
from random_checkpoint import tiny_config, write_random_checkpoint
from tiny_training import DATA, FRAMES, Squares, data_config
from torch import nn

from s2dm.models import load_checkpoint, mean_motion, presets, read_config
from s2dm.pipelines import embed_prompts
from s2dm.pipelines.modules import build, build_tokenizer
from s2dm.sector import implied_prediction
from s2dm.settings import SettingsError, from_dict
from s2dm.training import stage1
from s2dm.training.loop import step_generator
from s2dm.training.run_folder import RunFolder
from s2dm.training.stage1 import (
    Stage1Model,
    Stage1TrainingConfig,
    build_stage1_task,
    new_size,
    train_stage1,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def preset():
    """The preset `generator`."""
    config = tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.FLOW_GENERATORS, "generator", config.flow_generator)
        yield config


@pytest.fixture(scope="module")
def stage2_file(tmp_path_factory) -> Path:
    """A checkpoint as the stage-2 trainer writes it, of random weights."""
    path = tmp_path_factory.mktemp("stage2") / "stage2.safetensors"
    return write_random_checkpoint(path, tiny_config(flow_generator=None))


def _config(folder: Path, checkpoint: Path, **settings) -> Stage1TrainingConfig:
    values = {
        "output": str(folder),
        "checkpoint": str(checkpoint),
        "preset": "generator",
        "data": DATA,
        "steps": 3,
        "clips": 3,
        "mixed_precision": "no",
        "workers": 0,
        "warmup_steps": 1,
        "log_every": 1,
        "validation_clips": 2,
        "sample_frames": 2,
        "sample_steps": 2,
    }
    return from_dict(Stage1TrainingConfig, {**values, **settings})


@pytest.fixture(scope="module")
def task(tmp_path_factory, stage2_file, preset):
    return build_stage1_task(_config(tmp_path_factory.mktemp("run"), stage2_file), CPU)


def test_the_export_adds_stage_1_and_leaves_the_rest(tmp_path, stage2_file, preset):
    train_stage1(_config(tmp_path, stage2_file))
    before = load_checkpoint(stage2_file)
    after = load_checkpoint(tmp_path / "export.safetensors")
    assert set(after) == {*before, "flow_generator"}
    for part in before:
        there = after[part].state
        assert all(torch.equal(w.half(), there[key]) for key, w in before[part].state.items())
    assert after.config.flow_generator.frames == FRAMES
    assert any((tmp_path / "samples").glob("step_*.png"))
    assert "motion_ratio" in RunFolder(tmp_path).records()[-1]


def test_what_depends_on_the_data_is_measured_on_it(task):
    """A square of 12x12 of 32x32 pixels moves by 0, 1, 2 and 3 pixels, a half-frame is 16."""
    network = task.model_config.flow_generator
    rms = ((1 + 4 + 9) / 3) ** 0.5 / 16
    assert network.displacement_scale == pytest.approx(rms, rel=0.1)
    mean = (1 + 2 + 3) / 4 * (12 * 12) / 32**2 / 16
    assert network.motion == pytest.approx(mean, rel=0.1)


def test_a_run_keeps_its_scale_when_clips_are_added(tmp_path, stage2_file, preset, monkeypatch):
    train_stage1(_config(tmp_path, stage2_file, steps=1))
    before = read_config(tmp_path / "export.safetensors")
    monkeypatch.setattr(stage1, "measure", lambda _: (9.0, 9.0))
    train_stage1(_config(tmp_path, stage2_file, steps=2))
    after = read_config(tmp_path / "export.safetensors")
    assert after.flow_generator == before.flow_generator


def test_a_batch_is_whole_clips_with_noise_in_every_frame(task):
    batch = task.batch(step_generator(0, 0), CPU)
    height, width = task.model_config.flow_generator.size
    assert batch["flow"].shape == batch["noise"].shape == (3, FRAMES, 3, height, width)
    assert batch["reference"].shape == (3, 4, 4, 4)
    assert not torch.equal(batch["noise"][:, 0], batch["noise"][:, 1])
    assert (batch["flow"][:, 0, :2] == 0).all()
    assert (batch["flow"][:, 0, 2] == -1).all()
    scale = task.model_config.flow_generator.displacement_scale
    moved = batch["flow"].clone()
    moved[:, :, :2] *= scale
    torch.testing.assert_close(batch["motion"], mean_motion(moved))


def test_one_label_says_nothing_about_another(task):
    """Drawn together, guidance would start from labels that were never seen alone."""
    settings = {f"{label}_dropout": 0.5 for label in ("reference", "text", "motion")}
    before = task.config
    task.config = dataclasses.replace(before, clips=64, **settings)
    try:
        batch = task.batch(step_generator(0, 0), CPU)
    finally:
        task.config = before
    kept = torch.stack([batch[f"keep_{label}"] for label in ("reference", "text", "motion")])
    seen = {tuple(column) for column in kept.T.tolist()}
    assert len(seen) == 8


@pytest.mark.parametrize("dropped", ["reference", "text", "motion"])
def test_null_labels_are_drawn_each_for_itself(task, dropped):
    labels = ("reference", "text", "motion")
    settings = {f"{label}_dropout": float(label == dropped) for label in labels}
    before = task.config
    task.config = dataclasses.replace(before, **settings)
    try:
        batch = task.batch(step_generator(0, 0), CPU)
    finally:
        task.config = before
    assert {label: bool(batch[f"keep_{label}"].any()) for label in labels} == {
        label: label != dropped for label in labels
    }


def test_a_clip_comes_with_its_caption_as_the_text_encoder_reads_it(task, stage2_file):
    checkpoint = load_checkpoint(stage2_file, ["text_encoder"])
    encoder, tokenizer = build(checkpoint, "text_encoder"), build_tokenizer(checkpoint.config)
    captions = [f"square number {number}" for number in range(6)]
    with torch.no_grad():
        expected = embed_prompts(encoder, tokenizer, captions)
    assert (expected[1:] - expected[:-1]).abs().amax(1).min() > 0.01
    references = task.data.references.float()
    batch = task.batch(step_generator(0, 0), CPU)
    for reference, text in zip(batch["reference"], batch["text"], strict=True):
        (clip,) = (references == reference).flatten(1).all(1).nonzero()
        torch.testing.assert_close(text, expected[clip.item()])


def test_the_reference_is_frame_1_as_the_vae_has_it(task, stage2_file):
    checkpoint = load_checkpoint(stage2_file, ["vae"])
    vae = build(checkpoint, "vae").eval()
    references = task.data.references.float()
    for number, clip in enumerate(Squares(data_config(), "train")[i] for i in range(6)):
        with torch.no_grad():
            latents = vae.encode(clip.pixels * 2 - 1).latent_dist.mode()
        latents = latents * checkpoint.config.vae.scaling_factor
        apart = (latents - references[number]).abs().amax((1, 2, 3))
        assert apart[0] < 0.01 < apart[1:].min()


def test_timesteps_cover_the_schedule(task):
    before = task.config
    task.config = dataclasses.replace(before, clips=8)
    try:
        timesteps = task.batch(step_generator(0, 0), CPU)["timesteps"]
    finally:
        task.config = before
    assert sorted((timesteps * 8 // 1000).tolist()) == list(range(8))


class Oracle(nn.Module):
    """Knows the clean clip: answers with what the schedule asks for, and keeps what it was told."""

    def __init__(self, config, clean):
        super().__init__()
        self.config, self.clean = config, clean

    def forward(self, sample, timesteps, *labels, **kept):
        self.labels, self.kept = labels, kept
        alpha_bar = self.alpha_bars[timesteps]
        kind = self.config.schedule.prediction_type
        return implied_prediction(self.clean, sample, alpha_bar, kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_nothing_for_who_knows_the_clip(task, kind):
    batch = task.batch(step_generator(0, 0), CPU)
    network = task.model.flow_generator.config
    schedule = dataclasses.replace(network.schedule, prediction_type=kind)
    oracle = Oracle(dataclasses.replace(network, schedule=schedule), batch["flow"])
    model = Stage1Model(oracle, task.model.text_encoder)
    oracle.alpha_bars = model.alpha_bars
    assert model(batch)["loss"] < 1e-6
    oracle.clean = oracle.clean + 1
    assert model(batch)["loss"] > 0.1
    assert [*oracle.labels] == [batch[name] for name in ("reference", "text", "motion")]
    assert oracle.kept == {name: batch[name] for name in batch if name.startswith("keep_")}


def test_the_flow_generator_alone_learns(task):
    parameters = task.model.named_parameters()
    learning = {name for name, parameter in parameters if parameter.requires_grad}
    network = task.model.flow_generator.named_parameters()
    assert learning == {f"flow_generator.{name}" for name, _ in network}


def test_a_run_that_is_stopped_ends_where_one_that_was_not_does(tmp_path, stage2_file, preset):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train_stage1(_config(whole, stage2_file, steps=4, schedule="constant"))
    train_stage1(_config(parted, stage2_file, steps=2, schedule="constant"))
    train_stage1(_config(parted, stage2_file, steps=4, schedule="constant"))
    first, second = (
        load_checkpoint(run / "export.safetensors")["flow_generator"].state
        for run in (whole, parted)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_loss_falls_on_data_as_simple_as_this(tmp_path, stage2_file, preset):
    config = _config(tmp_path, stage2_file, steps=60, learning_rate=3e-3, ema_decay=0.9)
    train_stage1(config)
    losses = [r["loss"] for r in RunFolder(tmp_path).records() if "loss" in r]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_a_checkpoint_with_stage_1_is_gone_on_from(tmp_path, stage2_file, preset):
    train_stage1(_config(tmp_path / "first", stage2_file, steps=1))
    start = tmp_path / "first" / "export.safetensors"
    going_on = build_stage1_task(_config(tmp_path / "second", start), CPU)
    state = load_checkpoint(start)["flow_generator"].state
    network = going_on.model.flow_generator.state_dict()
    assert network.keys() == state.keys()
    assert all(torch.equal(value.float(), network[key]) for key, value in state.items())


def test_beside_stable_diffusion_a_new_network_has_lfdms_size():
    """The puppets' would be taken in silence, and is far too small."""
    assert new_size("", presets.SD15) == presets.LFDM.flow_generator
    assert new_size("", tiny_config()) == presets.PUPPETS.flow_generator
    assert new_size("puppets", presets.SD15) == presets.PUPPETS.flow_generator
    with pytest.raises(SettingsError, match=r"got 'sd15'.*lfdm is the size"):
        new_size("sd15", presets.SD15)


def test_it_learns_from_prepared_clips_too(tmp_path, stage2_file, preset):
    clips = write_clips(tmp_path / "clips")
    settings = {"clips_folder": str(clips.folder), "preset": "generator", "steps": 1}
    train_stage1(_config(tmp_path / "run", stage2_file, **settings))
    config = read_config(tmp_path / "run" / "export.safetensors").flow_generator
    assert (config.frames, config.text_dim) == (clips.num_frames, 64)
    assert any((tmp_path / "run" / "samples").glob("step_*.png"))
    other = write_clips(tmp_path / "other", channels=16)
    with pytest.raises(SettingsError, match=r"clips_folder: expected latents of 4.*got 16"):
        train_stage1(
            _config(tmp_path / "no", stage2_file, **{**settings, "clips_folder": str(other.folder)})
        )


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="set checkpoint"):
        Stage1TrainingConfig(output=str(tmp_path))


def test_a_checkpoint_without_text_encoder_is_refused(tmp_path, preset):
    config = tiny_config(text_encoder=None, tokenizer=None, flow_generator=None, unet=None)
    path = write_random_checkpoint(tmp_path / "vae.safetensors", config)
    with pytest.raises(SettingsError, match="without text_encoder"):
        build_stage1_task(_config(tmp_path, path), CPU)


def test_clips_in_which_nothing_moves_are_refused(tmp_path, stage2_file, preset):
    one_frame = {**DATA, "frames": 1}
    with pytest.raises(SettingsError, match="nothing moves"):
        build_stage1_task(_config(tmp_path, stage2_file, data=one_frame), CPU)
