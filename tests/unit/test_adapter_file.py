"""A file with a flow adapter alone: written whole or not at all, and what it says about itself."""

import dataclasses

import pytest
import torch
from random_checkpoint import TINY

from s2dm.models import (
    FUSIONS,
    AdapterTrainingConfig,
    CheckpointError,
    FlowAdapter,
    SamplingConfig,
    ScheduleConfig,
    load_checkpoint,
    read_config,
    save_adapter,
)
from s2dm.settings import SettingsError

TRAINING = AdapterTrainingConfig("dreamy_v8.safetensors", clips=30, steps=500)
ABOUT = {
    "training": TRAINING,
    "schedule": ScheduleConfig(prediction_type="v_prediction"),
    "resolution": (512, 384),
    "frames": 16,
    "sampling": SamplingConfig(steps=12),
    "data": "my clips",
    "licence": "CC0-1.0",
}


def adapter_of(fusion):
    torch.manual_seed(0)
    return FlowAdapter(dataclasses.replace(TINY.flow_adapter, fusion=fusion))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_adapter_comes_back_with_what_it_was_trained_on(tmp_path, fusion):
    adapter, path = adapter_of(fusion), tmp_path / "new" / "mine.safetensors"
    save_adapter(path, adapter.config, adapter.state_dict(), **ABOUT)
    found = load_checkpoint(path, ("flow_adapter",))
    config, state = found["flow_adapter"]
    assert config == adapter.config and config.fusion == fusion
    assert state.keys() == adapter.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in adapter.state_dict().items())
    about = found.config
    assert about.adapter_training == TRAINING
    assert about.schedule.prediction_type == "v_prediction"
    assert (about.resolution, about.frames, about.sampling.steps) == ((512, 384), 16, 12)
    assert (about.data, about.licence) == ("my clips", "CC0-1.0")
    assert about.unet is about.vae is about.text_encoder is about.tokenizer is None


def test_half_precision(tmp_path):
    adapter, path = adapter_of("spatial"), tmp_path / "mine.safetensors"
    save_adapter(path, adapter.config, adapter.state_dict(), **ABOUT, dtype=torch.float16)
    state = load_checkpoint(path)["flow_adapter"].state
    assert {weight.dtype for weight in state.values()} == {torch.float16}


def test_what_is_wrong_is_refused_and_the_old_file_stays(tmp_path):
    adapter, path = adapter_of("spatial"), tmp_path / "mine.safetensors"
    save_adapter(path, adapter.config, adapter.state_dict(), **ABOUT)
    before = path.read_bytes()
    broken = adapter.state_dict()
    broken["pyramid.null"] = broken["pyramid.null"] * float("nan")
    with pytest.raises(CheckpointError, match=r"not saved.*finite.*pyramid\.null"):
        save_adapter(path, adapter.config, broken, **ABOUT)
    lacking = adapter.state_dict()
    del lacking["pyramid.null"]
    with pytest.raises(CheckpointError, match=r"missing 's2dm\.flow_adapter\.pyramid\.null'"):
        save_adapter(path, adapter.config, lacking, **ABOUT)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_fusion_that_its_weights_are_not_of_is_refused(tmp_path):
    adapter, path = adapter_of("channel"), tmp_path / "mine.safetensors"
    other = dataclasses.replace(adapter.config, fusion="channel+spatial")
    with pytest.raises(CheckpointError, match=r"missing 's2dm\.flow_adapter\.pyramid"):
        save_adapter(path, other, adapter.state_dict(), **ABOUT)
    assert not path.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"base": 3}, "base: expected text"), ({"clips": -1}, "clips: expected a whole number")],
)
def test_training_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(TRAINING, **values)


def test_whole_checkpoints_say_nothing_of_it(tmp_path):
    assert TINY.adapter_training is None
    adapter, path = adapter_of("channel"), tmp_path / "mine.safetensors"
    save_adapter(path, adapter.config, adapter.state_dict(), **ABOUT)
    assert read_config(path).adapter_only() == read_config(path)
