"""The paper's recipe: its optimiser to the letter, and an autoencoder that keeps its latents."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from tiny_training import DATA, stage2_config, vae_config

from s2dm.models import load_checkpoint
from s2dm.settings import SettingsError, read_settings, to_dict
from s2dm.training.cache import build_clip_cache, clip_latents
from s2dm.training.config import TrainingConfig
from s2dm.training.cpu import plain_attention, speed_up
from s2dm.training.loop import step_generator
from s2dm.training.models import frozen_vae
from s2dm.training.run_folder import RunFolder
from s2dm.training.stage2 import Stage2TrainingConfig, build_stage2_task, train_stage2
from s2dm.training.vae import VAETrainingConfig, build_vae_task, train_vae

pytestmark = pytest.mark.usefixtures("tiny_preset")

CPU = torch.device("cpu")
OPTIMISER = (
    "optimizer", "betas", "learning_rate", "schedule", "warmup_steps", "weight_decay",
    "gradient_clip", "ema_decay",
)  # fmt: skip


def shipped(kind, name):
    with resources.as_file(resources.files("s2dm.training") / "configs" / name) as path:
        return read_settings(kind, path)


def test_the_preset_has_the_papers_numbers():
    paper = shipped(Stage2TrainingConfig, "paper.toml")
    numbers = [getattr(paper, name) for name in OPTIMISER]
    assert numbers == ["adam", (0.9, 0.999), 2e-5, "constant", 0, 0.0, 0.0, 0.0]
    assert (paper.clips, paper.clip_frames, paper.data.frames, paper.data.size) == (4, 16, 16, 128)
    assert paper.noise_sharing == "shared" and paper.fusion == "channel"
    assert paper.train == ("unet", "flow_adapter")
    assert paper.sampling["steps"] == 20 and paper.sampling["guidance_scale"] == 7.5
    assert paper.sampling["flow_start"] == paper.sampling["anchor_end"] == 0
    assert paper.data.options["frame_sampling"] == "random"
    vae = shipped(VAETrainingConfig, "paper_vae.toml")
    assert not vae.normalise and not vae.freeze_encoder
    assert [getattr(vae, name) for name in OPTIMISER] == numbers


def test_ours_marks_each_setting_that_differs():
    """The comments beside `sd15.toml` name the settings in which it differs, no others."""
    paper, ours = (
        {**to_dict(shipped(Stage2TrainingConfig, name)), "output": ""}
        for name in ("paper.toml", "sd15.toml")
    )
    text = (resources.files("s2dm.training") / "configs" / "sd15.toml").read_text("utf-8")
    marked = {line.split(" =")[0] for line in text.splitlines() if "# paper.toml:" in line}
    differing = {name for name in paper if paper[name] != ours[name]}
    # What belongs to a setting above it needs no mark of its own.
    assert marked == differing - {"final_learning_rate", "clip_frames"}


def test_a_run_does_what_plain_adam_does(tmp_path, vae_file):
    """Step by step with torch's own Adam: nothing is clipped, averaged, decayed or warmed up."""
    paper = shipped(Stage2TrainingConfig, "paper.toml")
    settings = {name: getattr(paper, name) for name in OPTIMISER}
    settings["betas"] = list(settings["betas"])
    settings["learning_rate"] = 1e-2  # large enough to see, and to be clipped by others
    config = stage2_config(tmp_path / "run", vae_file, **settings, cache=str(tmp_path / "cache"))
    train_stage2(config)
    task = build_stage2_task(config, CPU)
    speed_up(task.model)
    adam = torch.optim.Adam(
        [p for p in task.model.parameters() if p.requires_grad], 1e-2, (0.9, 0.999)
    )
    task.export(task.model, tmp_path / "start.safetensors")
    task.model.train()
    with plain_attention(CPU):
        for step in range(config.steps):
            batch = task.batch(step_generator(config.seed, step, 0, 0), CPU)
            adam.zero_grad()
            task.model(batch)["loss"].backward()
            adam.step()
    task.export(task.model, tmp_path / "plain.safetensors")
    start, plain, ours = (
        load_checkpoint(tmp_path / name)["unet"].state
        for name in ("start.safetensors", "plain.safetensors", "run/export.safetensors")
    )
    moved = sum((plain[key].float() - start[key].float()).square().sum() for key in plain)
    apart = sum((plain[key].float() - ours[key].float()).square().sum() for key in plain)
    # The files are in half precision, and Adam's first steps magnify rounding.
    assert moved > 0 and apart < 1e-3 * moved
    norms = [r["gradient_norm"] for r in RunFolder(tmp_path / "run").records() if "loss" in r]
    assert norms and min(norms) > 0


def test_without_an_average_the_export_has_the_weights_of_the_step(tmp_path, vae_file):
    from s2dm.training.loop import TrainingLoop

    config = stage2_config(tmp_path, vae_file, ema_decay=0.0, steps=2)
    loop = TrainingLoop(config, build_stage2_task(config, CPU))
    loop.run()
    live = dict(loop.model.named_parameters())
    for name, average in loop.ema.average.items():
        assert average.data_ptr() == live[name].data_ptr()
    assert loop.ema.state_dict()["average"] == {}
    again = TrainingLoop(config, build_stage2_task(config, CPU))
    assert again.run().step == 2  # there is nothing left to do, and the state can be read


def test_settings_of_the_optimiser_are_checked():
    for settings, message in (
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'adam', got 'sgd'"),
        ({"gradient_clip": -1.0}, "gradient_clip must be at least 0"),
        ({"ema_decay": 1.0}, "ema_decay from 0 to less than 1"),
    ):
        with pytest.raises(SettingsError, match=message):
            TrainingConfig(**settings)


def test_a_fine_tuned_autoencoder_keeps_the_scale_of_its_latents(tmp_path, vae_file):
    """Encoder and decoder both learn, and the U-Net still knows what comes out."""
    train_vae(
        vae_config(
            tmp_path, checkpoint=str(vae_file), normalise=False, learning_rate=1e-5, steps=3,
            ema_decay=0.0, gradient_clip=0.0,
        )
    )  # fmt: skip
    export = tmp_path / "export.safetensors"
    before, after = (load_checkpoint(f)["vae"] for f in (vae_file, export))
    assert before.config.scaling_factor == after.config.scaling_factor
    moved = {k.split(".")[0] for k, v in before.state.items() if not v.equal(after.state[k])}
    assert {"encoder", "decoder"} <= moved
    config = vae_config(tmp_path / "n", checkpoint=str(vae_file), learning_rate=1e-4, steps=3)
    clips = build_clip_cache(tmp_path / "cache", config.data)
    latents = [
        torch.from_numpy(clip_latents(clips, vae, vae.config.scaling_factor, CPU, False)).float()
        for vae in (frozen_vae(part.config, part.state, CPU) for part in (before, after))
    ]
    assert not latents[0].equal(latents[1])
    assert (latents[0] - latents[1]).std() < 0.05 * latents[0].std()
    with pytest.raises(SettingsError, match="normalise=false needs a checkpoint"):
        build_vae_task(vae_config(tmp_path / "x", normalise=False, data=DATA))
