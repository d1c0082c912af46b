"""The trainer of stage 2: what a batch holds, what learns, what it writes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from random_checkpoint import tiny_config, write_random_checkpoint
from tiny_training import FRAMES, SIZE, stage2_config

from s2dm.models import Checkpoint, SamplingConfig, load_checkpoint, save_checkpoint
from s2dm.sector import ReferenceStates
from s2dm.settings import SettingsError
from s2dm.training.loop import step_generator
from s2dm.training.run_folder import RunFolder
from s2dm.training.stage2 import build_stage2_task, train_stage2

pytestmark = pytest.mark.usefixtures("tiny_preset")


def test_stage2_export_is_a_whole_checkpoint(tmp_path, vae_file):
    train_stage2(stage2_config(tmp_path, vae_file, steps=2))
    made = load_checkpoint(tmp_path / "export.safetensors")
    config = made.config
    assert set(made) == {"unet", "text_encoder", "vae", "flow_adapter"}
    assert config.tokenizer["kind"] == "bpe"
    assert (config.resolution, config.frames) == ((SIZE, SIZE), FRAMES)
    for part in made:
        assert {weight.dtype for weight in made[part].state.values()} == {torch.float16}


def test_only_the_named_parts_learn(tmp_path, vae_file):
    first = tmp_path / "first"
    train_stage2(stage2_config(first, vae_file, steps=1, sampling={"guidance_scale": 2.0}))
    start = first / "export.safetensors"
    config = stage2_config(
        tmp_path / "second", "", checkpoint=str(start), train=["flow_adapter"], steps=2,
        sampling={"flow_guidance_scale": 1.0},
    )  # fmt: skip
    train_stage2(config)
    before = load_checkpoint(start)
    after = load_checkpoint(tmp_path / "second" / "export.safetensors")
    assert before.config.sampling == SamplingConfig(guidance_scale=2.0)
    assert after.config.sampling == SamplingConfig(guidance_scale=2.0, flow_guidance_scale=1.0)
    same = {
        part: all(torch.equal(value, after[part].state[key]) for key, value in state.items())
        for part, state in before.states.items()
    }
    assert same == {"unet": True, "text_encoder": True, "vae": True, "flow_adapter": False}


@pytest.mark.parametrize("fusion", ["spatial", "channel+spatial"])
def test_an_adapter_with_spatial_features_is_trained_and_goes_on(tmp_path, vae_file, fusion):
    """Its conditions are as large as the pictures; a checkpoint that holds one needs no fusion."""
    first = tmp_path / "first"
    train_stage2(stage2_config(first, vae_file, steps=2, fusion=fusion))
    start = first / "export.safetensors"
    made = load_checkpoint(start)
    assert made.config.flow_adapter.fusion == fusion
    moved = [name for name, weight in made["flow_adapter"].state.items() if ".to_" in name]
    assert all(made["flow_adapter"].state[name].any() for name in moved)
    config = stage2_config(
        tmp_path / "second", "", checkpoint=str(start), train=["flow_adapter"], steps=1
    )
    task = build_stage2_task(config, torch.device("cpu"))
    assert task.model_config.flow_adapter.fusion == fusion
    assert _batch(task)["conditions"].shape[2:] == (3, SIZE, SIZE)
    train_stage2(config)


def test_an_adapter_that_was_never_trained_gives_way_to_another_fusion(tmp_path, vae_file):
    """As `s2dm convert` adds one; a trained one is never dropped in silence."""
    first = tmp_path / "first"
    train_stage2(stage2_config(first, vae_file, steps=1))
    found = load_checkpoint(first / "export.safetensors")
    fresh, trained = tmp_path / "fresh.safetensors", first / "export.safetensors"
    adapter = {
        name: torch.zeros_like(weight) if ".to_" in name else weight
        for name, weight in found["flow_adapter"].state.items()
    }
    save_checkpoint(fresh, Checkpoint(found.config, {**found.states, "flow_adapter": adapter}))

    def task(start, **settings):
        config = stage2_config(tmp_path / "next", "", checkpoint=str(start), **settings)
        return build_stage2_task(config, torch.device("cpu"))

    assert task(fresh).model_config.flow_adapter.fusion == "channel"
    assert task(fresh, fusion="spatial").model.flow_adapter.config.fusion == "spatial"
    with pytest.raises(SettingsError, match=r"trained with channel fusion.*Leave fusion out"):
        task(trained, fusion="spatial")


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """A checkpoint with stage 1 in it, of random weights."""
    return write_random_checkpoint(tmp_path_factory.mktemp("two_stages") / "both.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": ["flow_adapter", "text_encoder"]},
        {"train": ["unet"], "text_encoder": "another.safetensors"},
    ],
)
def test_the_text_encoder_of_stage_1_stays(tmp_path, two_stages, settings):
    config = stage2_config(tmp_path, "", checkpoint=str(two_stages), **settings)
    with pytest.raises(SettingsError, match=r"both\.safetensors holds stage 1.*Leave it out"):
        build_stage2_task(config, torch.device("cpu"))


def test_stage_1_comes_out_as_it_went_in(tmp_path, two_stages):
    train = ["unet", "flow_adapter"]
    config = stage2_config(tmp_path, "", checkpoint=str(two_stages), train=train, steps=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, frames=3))
    train_stage2(config)
    before = load_checkpoint(two_stages)
    after = load_checkpoint(tmp_path / "export.safetensors")
    # Not the few frames of a clip that stage 2 learns from.
    assert after.config.frames == before.config.frames != config.data.frames
    assert after.config.flow_generator == tiny_config().flow_generator
    same = {
        part: all(torch.equal(value.half(), after[part].state[key]) for key, value in state.items())
        for part, state in before.states.items()
    }
    assert {part for part in same if not same[part]} == set(train)


@pytest.fixture(scope="module")
def stage2_task(tmp_path_factory, vae_file):
    config = stage2_config(tmp_path_factory.mktemp("stage2"), vae_file)
    return build_stage2_task(config, torch.device("cpu"))


def _batch(task, number=0, **settings):
    config = task.config
    task.config = dataclasses.replace(config, **settings)
    try:
        return task.batch(step_generator(0, number), torch.device("cpu"))
    finally:
        task.config = config


@pytest.mark.parametrize("sharing", ["shared", "independent", "mixed"])
def test_frames_share_their_noise_as_configured(stage2_task, sharing):
    noise = _batch(stage2_task, noise_sharing=sharing)["noise"]
    assert noise.shape == (3, 2, 4, 4, 4)
    assert torch.equal(noise[:, 0], noise[:, 1]) == (sharing == "shared")
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(
    ("both", "text", "flow"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_null_labels_are_dropped_together_or_alone(stage2_task, both, text, flow):
    empty = stage2_task.token_ids[-1]
    batch = _batch(stage2_task, label_dropout=both, text_dropout=text, flow_dropout=flow)
    assert bool((batch["token_ids"] == empty).all()) == bool(both or text)
    assert bool(batch["flow_null"].all()) == bool(both or flow)


def test_frame_one_comes_with_zero_flow(stage2_task):
    always = _batch(stage2_task, first_frame=1.0)
    assert (always["conditions"][:, 0, :2] == 0).all()
    never = _batch(stage2_task, first_frame=0.0)
    assert (never["conditions"][:, :, :2].abs().amax((2, 3, 4)) > 0).all()


def test_timesteps_cover_the_schedule(stage2_task):
    timesteps = _batch(stage2_task, clips=8)["timesteps"]
    assert sorted((timesteps * 8 // 1000).tolist()) == list(range(8))


def test_null_flow_replaces_the_tokens(stage2_task):
    model = stage2_task.model
    conditions = torch.randn(2, 3, 88, 56)
    tokens = model.flow_tokens(conditions, torch.tensor([False, True]))
    assert torch.equal(tokens[1:], model.flow_adapter.null_tokens(1))
    assert torch.allclose(tokens[:1], model.flow_adapter.encode(conditions[:1]), atol=1e-5)


def test_latents_are_those_of_the_frames(stage2_task):
    frames = stage2_task.clips.pixels(2)
    with torch.no_grad():
        expected = stage2_task.vae.encode(frames * 2 - 1).latent_dist.mode()
    got = torch.from_numpy(np.array(stage2_task.latents[2])).float()
    assert torch.allclose(got, expected, atol=5e-3)


@pytest.mark.slow
def test_stage2_learns(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, steps=60, clips=8, log_every=20, learning_rate=3e-3)
    train_stage2(config)
    losses = [r["loss"] for r in RunFolder(tmp_path).records() if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]


def test_a_checkpoint_without_unet_is_refused(tmp_path, vae_file):
    config = stage2_config(tmp_path, vae_file, checkpoint=str(vae_file))
    with pytest.raises(SettingsError, match="a checkpoint with a U-Net, got"):
        build_stage2_task(config, torch.device("cpu"))


def test_with_reference_attention_every_clip_begins_with_frame_1(stage2_task):
    settings = {"reference_attention": True, "first_frame": 0.0, "clip_frames": 3}
    batch = _batch(stage2_task, reference_dropout=0.0, **settings)
    assert "reference" in batch
    assert batch["latents"].shape[1] == 3
    assert (batch["conditions"][:, 0] == 0).all()
    assert (batch["conditions"][:, 1:, :2].abs().amax((2, 3, 4)) > 0).all()
    assert "reference" not in _batch(stage2_task, reference_dropout=1.0, **settings)
    assert "reference" not in _batch(stage2_task)


def test_the_reference_reaches_the_other_frames_and_no_other_clip(stage2_task):
    model, generator = stage2_task.model.eval(), torch.Generator().manual_seed(0)
    x_t = torch.randn(6, 4, 4, 4, generator=generator)  # two clips of three frames
    text = torch.randn(6, 77, model.unet.config.cross_attention_dim, generator=generator)

    def predict(x_t):
        beside = functools.partial(ReferenceStates().beside, groups=2, first=True)
        timesteps = torch.full((6,), 500)
        with torch.no_grad():
            return model.unet(
                x_t, timesteps, text, cross_attention_kwargs={"reference": beside}
            ).sample

    changed = x_t.clone()
    changed[0] += 1
    difference = (predict(changed) - predict(x_t)).abs().amax((1, 2, 3))
    assert (difference[:3] > 1e-4).all()
    assert difference[3:].max() < 1e-6


def test_checkpointing_gives_the_same_gradients_with_a_reference(stage2_task):
    batch = _batch(stage2_task, reference_attention=True, reference_dropout=0.0, clip_frames=3)
    model = stage2_task.model.train()

    def gradients():
        model.zero_grad(set_to_none=True)
        model(batch)["loss"].backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.unet.enable_gradient_checkpointing()
    try:
        again = gradients()
    finally:
        model.unet.disable_gradient_checkpointing()
        model.zero_grad(set_to_none=True)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[key], again[key], atol=1e-6) for key in plain)


def test_frames_that_cannot_know_the_place_do_not_count_early(stage2_task, monkeypatch):
    settings = {"reference_attention": True, "clips": 8, "label_dropout": 0.0, "text_dropout": 0.0}
    usual = _batch(stage2_task, **settings)
    assert (usual["weights"] == 1).all()
    everywhere = np.ones(len(stage2_task.clips), bool)
    monkeypatch.setattr(stage2_task.clips, "elsewhere", everywhere)
    early = usual["timesteps"] >= 850
    assert early.any()
    assert not early.all()
    first_only = _batch(stage2_task, flow_dropout=0.0, **settings)["weights"]
    assert torch.equal(first_only[:, 0], (~early).float())
    assert (first_only[:, 1:] == 1).all()
    without_flow = _batch(stage2_task, flow_dropout=1.0, **settings)["weights"]
    assert torch.equal(without_flow, (~early).float()[:, None].expand_as(without_flow))


def test_frames_without_weight_do_not_move_the_loss(stage2_task):
    batch = _batch(stage2_task)
    ones = stage2_task.model(batch)["loss"]
    batch["weights"][0] = 0
    without = stage2_task.model({key: value[1:] for key, value in batch.items()})["loss"]
    weighted = stage2_task.model(batch)["loss"]
    assert weighted.item() == pytest.approx(without.item(), rel=1e-4)
    assert weighted.item() != pytest.approx(ones.item(), rel=1e-4)
