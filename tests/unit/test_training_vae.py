"""The trainer of the autoencoder: loss, crops, what it writes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from random_checkpoint import TINY
from tiny_training import DATA, SIZE, vae_config

from s2dm.models import load_checkpoint
from s2dm.pipelines.modules import build, build_vae, reconstruct
from s2dm.settings import SettingsError
from s2dm.training.loop import step_generator
from s2dm.training.run_folder import RunFolder
from s2dm.training.vae import PyramidLoss, build_vae_task, normalise_latents, train_vae

pytestmark = pytest.mark.usefixtures("tiny_preset")


def test_pyramid_loss_counts_edges_and_colours():
    picture = torch.zeros(1, 3, 16, 16)
    loss = PyramidLoss()
    assert loss(picture, picture) == 0
    grey, edge, tint = picture + 0.1, picture.clone(), picture.clone()
    edge[..., 8:] = 0.2
    tint[:, 0], tint[:, 1] = 0.1, -0.1
    assert loss(edge, picture) > PyramidLoss(edge_weight=0)(edge, picture)
    assert loss(tint, picture) > PyramidLoss(colour_weight=0)(tint, picture)
    assert loss(grey, picture) == PyramidLoss(0, 0)(grey, picture)


def test_guide_fades(tmp_path):
    task = build_vae_task(vae_config(tmp_path, guide_steps=2))
    mean, pixels = torch.ones(1, 4, 4, 4), torch.zeros(1, 3, 16, 16)
    pulls = []
    for step in range(3):
        pulls.append(float(task.model._guide(mean, pixels)))
        task.model(task.batch(step_generator(0, step), torch.device("cpu")))
    assert pulls == pytest.approx([1.0, 0.5, 0.0])
    task.model.eval()(task.batch(step_generator(0, 3), torch.device("cpu")))
    assert task.model.steps == 3, "looking is not a step"


def test_frozen_encoder_keeps_its_latents(tmp_path, vae_file):
    train_vae(
        vae_config(tmp_path, checkpoint=str(vae_file), freeze_encoder=True, learning_rate=1e-2)
    )
    before, after = (
        load_checkpoint(f)["vae"].state for f in (vae_file, tmp_path / "export.safetensors")
    )
    same = {key: torch.equal(value, after[key]) for key, value in before.items()}
    encoder = [same[key] for key in same if key.startswith(("encoder.", "quant_conv."))]
    assert encoder and all(encoder)
    assert not all(same[key] for key in same if key.startswith("decoder."))
    with pytest.raises(SettingsError, match="needs a checkpoint"):
        build_vae_task(vae_config(tmp_path, freeze_encoder=True))


def test_normalised_vae_is_the_same_function():
    torch.manual_seed(0)
    vae = build_vae(TINY.vae).eval()
    picture = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(picture).latent_dist
        output = vae.decode(before.mean).sample
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        state = {k: v.clone() for k, v in vae.state_dict().items()}
        normalise_latents(state, mean, std)
        vae.load_state_dict(state)
        after = vae.encode(picture).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4)
        spread = std.reshape(1, -1, 1, 1)
        assert torch.allclose(after.std * spread, before.std, rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, output, atol=1e-4)


def test_crops_are_where_something_moves(tmp_path):
    config = vae_config(tmp_path, motion_share=1.0, whole_frames=0.0, crop=8)
    task = build_vae_task(config)
    grey = torch.full((3, 1, 1), round(0.5 * 255) / 255)
    seen = 0
    for step in range(20):
        batch = task.batch(step_generator(0, step), torch.device("cpu"))
        assert batch["pixels"].shape == (2, 3, 8, 8)
        assert batch["noise"].shape == (2, 4, 1, 1)
        seen += sum(bool((picture != grey).any()) for picture in batch["pixels"])
    assert seen >= 36  # of 40; uniform crops meet the square about half the time


def test_whole_frames_keep_the_number_of_pixels(tmp_path):
    task = build_vae_task(vae_config(tmp_path, whole_frames=1.0, batch_size=8, crop=16))
    batch = task.batch(step_generator(0, 0), torch.device("cpu"))
    assert batch["pixels"].shape == (2, 3, SIZE, SIZE)


def test_vae_run_writes_everything(vae_file):
    folder = vae_file.parent
    made = load_checkpoint(vae_file)
    assert made.config.vae.scaling_factor == 1.0 and set(made) == {"vae"}
    records = RunFolder(folder).records()
    assert {"loss", "kl", "psnr"} <= {key for record in records for key in record}
    for name in ("config.json", "curves.png", "state/model.safetensors"):
        assert (folder / name).exists()
    assert len(list(folder.glob("samples/*.png"))) == 1
    assert not [p for p in folder.iterdir() if p.name.startswith((".", "state."))]


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    """Not on whether the clips had to be prepared, which draws random numbers too."""
    config = vae_config(tmp_path, cache=str(tmp_path / "cache"))
    first, again = (build_vae_task(config).model.state_dict() for _ in range(2))
    other = build_vae_task(dataclasses.replace(config, seed=1)).model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_crop_must_fit_the_vae(tmp_path):
    with pytest.raises(SettingsError, match="multiple of the VAE's factor 8"):
        build_vae_task(vae_config(tmp_path, crop=18))


def test_an_adversarial_loss_below_its_least_crop_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="at least 12"):
        build_vae_task(vae_config(tmp_path, crop=8, adversarial_weight=0.5))


def test_a_run_with_an_adversarial_loss_writes_the_vae_alone(tmp_path, vae_file):
    train_vae(
        vae_config(tmp_path, checkpoint=str(vae_file), adversarial_weight=0.5, adversarial_warmup=1)
    )
    build(load_checkpoint(tmp_path / "export.safetensors"), "vae")
    records = [record for record in RunFolder(tmp_path).records() if "loss" in record]
    assert len(records) == 2 and records[-1]["loss_fooling"] != 0
    for record in records:
        parts = [record[f"loss_{part}"] for part in ("reconstruction", "fooling", "judging")]
        assert record["loss"] == pytest.approx(sum(parts) + 1e-3 * record["kl"], rel=1e-4)


def test_sizes_between_whole_cells_go_through_the_autoencoder(tmp_path):
    task = build_vae_task(vae_config(tmp_path))
    pictures = torch.rand(2, 3, 19, 21)
    assert reconstruct(task.model.vae, pictures).shape == pictures.shape


def test_clips_that_are_no_whole_cells_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data.size must be a multiple of .*, got 33"):
        build_vae_task(vae_config(tmp_path, data={**DATA, "size": 33}))


def test_schedules_count_steps_whatever_is_accumulated(tmp_path):
    task = build_vae_task(vae_config(tmp_path, gradient_accumulation=4))
    task.model.train()
    for micro in range(8):
        task.model(task.batch(step_generator(0, 0, micro), torch.device("cpu")))
    assert task.model.steps == 2
