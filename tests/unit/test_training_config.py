"""The settings of the trainers."""

from __future__ import annotations

import json
from importlib import resources

import pytest

pytest.importorskip("diffusers")

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.models import SamplingConfig, read_config
from s2dm.settings import SettingsError, from_dict, read_settings, to_dict
from s2dm.training.config import TrainingConfig
from s2dm.training.region_motion import RegionMotionTrainingConfig
from s2dm.training.stage1 import Stage1TrainingConfig
from s2dm.training.stage2 import Stage2TrainingConfig
from s2dm.training.text import TextTrainingConfig
from s2dm.training.vae import VAETrainingConfig


def test_unknown_setting_is_named():
    with pytest.raises(SettingsError, match=r"data\.'colour'"):
        from_dict(TrainingConfig, {"data": {"colour": 1}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps must be of type int"),
        ({"steps": True}, "steps must be of type int"),
        ({"data": 3}, "data: expected a table of settings, got 3"),
        ({"betas": 0.9}, "betas must be a list"),
        ({"schedule": "linear"}, "schedule must be"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        ({"data": {"estimated_flow": 1.2}}, "a share from 0 to 1, got 1.2"),
        ({"data": {"estimated_flow": -0.1}}, "a share from 0 to 1, got -0.1"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        from_dict(TrainingConfig, values)


def test_stage2_settings_are_checked():
    with pytest.raises(SettingsError, match=r"noise_sharing, .*got 'sometimes'\."):
        Stage2TrainingConfig(noise_sharing="sometimes")
    with pytest.raises(SettingsError, match=r"noise_share: .*from 0 to 1, got 1\.5"):
        Stage2TrainingConfig(noise_sharing="mixed", noise_share=1.5)
    with pytest.raises(SettingsError, match="train must name"):
        Stage2TrainingConfig(train=("vae",))


def test_overrides_reach_into_tables(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"steps": 5, "data": {"takes": 3}}))
    config = read_settings(TrainingConfig, file, ["data.size=64", "output=somewhere", "threads=2"])
    assert (config.steps, config.data.takes, config.data.size) == (5, 3, 64)
    assert (config.output, config.threads) == ("somewhere", 2)
    assert from_dict(TrainingConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("puppets_vae.toml", VAETrainingConfig),
        ("puppets_decoder.toml", VAETrainingConfig),
        ("puppets_text.toml", TextTrainingConfig),
        ("puppets_stage2.toml", Stage2TrainingConfig),
        ("puppets_third.toml", Stage2TrainingConfig),
        ("puppets_ablation.toml", Stage2TrainingConfig),
        ("puppets_pose.toml", Stage2TrainingConfig),
        ("puppets_stage1.toml", Stage1TrainingConfig),
        ("paper.toml", Stage2TrainingConfig),
        ("paper_vae.toml", VAETrainingConfig),
        ("sd15.toml", Stage2TrainingConfig),
        ("puppets_region_motion.toml", RegionMotionTrainingConfig),
    ],
)
def test_shipped_configs_are_valid(name, kind):
    data = "puppets" if name.startswith("puppets") else "mhad"
    with resources.as_file(resources.files("s2dm.training") / "configs" / name) as path:
        assert read_settings(kind, path).data.name == data


def test_every_shipped_config_is_tested():
    folder = resources.files("s2dm.training") / "configs"
    (mark,) = test_shipped_configs_are_valid.pytestmark
    assert {name for name, _ in mark.args[1]} == {file.name for file in folder.iterdir()}


def test_a_model_trained_as_the_bundled_one_is_sampled_as_it_is():
    """By two runs: from random weights, and on from what came of that."""
    with resources.as_file(resources.files("s2dm.training") / "configs") as folder:
        first, second = (
            read_settings(Stage2TrainingConfig, folder / f"puppets_{name}.toml").sampling
            for name in ("stage2", "third")
        )
    bundled = read_config(DEFAULT_CHECKPOINT)
    assert SamplingConfig(**first).replacing(second) == bundled.sampling
