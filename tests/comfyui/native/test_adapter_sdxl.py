"""A flow adapter for a U-Net of Stable Diffusion XL's shape, and for what no adapter is made."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import relative
from core_models import sdxl

from s2dm.models import FUSIONS

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def model(rig):
    return sdxl()


@pytest.fixture(scope="module")
def adapter(rig):
    return rig.module("nodes.native.adapter")


def config_for(adapter, model, fusion):
    return adapter.adapter_config_for(model, fusion, width=32, hidden=32)


def trained(rig, config):
    """Random weights, as after training."""
    torch.manual_seed(0)
    network = rig.module("s2dm.models").FlowAdapter(config)
    for projection in network.layers.parameters():
        torch.nn.init.normal_(projection, std=0.3)
    return network.state_dict()


def sample(rig, model, flow, **inputs):
    """As CLIP of Stable Diffusion XL gives prompts: wider ones, with a pooled one beside."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        [[torch.randn(1, 77, 64, generator=generator), {"pooled_output": torch.zeros(1, 1280)}]]
        for _ in range(2)
    ]
    encoded = rig.encode(flow, positive=prompts[0], negative=prompts[1])
    return rig.sample(encoded, model, steps=1, **inputs)


def test_the_config_has_the_layers_and_levels_of_the_model(adapter, model):
    config = config_for(adapter, model, "spatial")
    layers = dict(config.layers)
    assert config.levels == (1, 2)
    assert {"input_3_0", "input_5_0", "input_5_1", "middle_0_1", "output_0_1"} <= set(layers)
    assert "input_1_0" not in layers
    assert (layers["input_3_0"], layers["middle_0_1"], layers["output_2_0"]) == (64, 128, 64)


def test_the_config_is_that_of_the_checkpoint_of_stable_diffusion_1(rig, adapter):
    found = adapter.adapter_config_for(rig.plain_model(), "channel", width=32, hidden=32)
    assert dict(found.layers) == dict(rig.loaded.config.flow_adapter.layers)
    assert dataclasses.replace(found, layers=()) == dataclasses.replace(
        rig.loaded.config.flow_adapter, layers=()
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_flow_acts_and_an_untrained_adapter_does_not(rig, adapter, model, fusion):
    config, flow = config_for(adapter, model, fusion), rig.flow(3, height=72, width=40)
    state = trained(rig, config)
    zero = {k: torch.zeros_like(w) if ".to_" in k else w for k, w in state.items()}
    plain = sample(rig, model, flow)
    untrained = adapter.apply_adapter(model, config, zero, chunk_size=100)
    assert torch.equal(sample(rig, untrained, flow), plain)
    patched = adapter.apply_adapter(model, config, state, chunk_size=100)
    clip = sample(rig, patched, flow)
    assert relative(clip, plain) > 1e-4
    assert relative(clip, sample(rig, patched, rig.flow(3, 72, 40, seed=1))) > 1e-5
    chunks = adapter.apply_adapter(model, config, state, chunk_size=2)
    assert relative(sample(rig, chunks, flow), clip) < 1e-5
    assert torch.equal(sample(rig, model, flow), plain), "the model that came in was changed"


def test_an_adapter_file_is_listed_and_applied(rig, adapter, model, caplog):
    from pathlib import Path

    import folder_paths

    from s2dm.models import AdapterTrainingConfig, FlowAdapterConfig, ScheduleConfig, save_adapter

    config = config_for(adapter, model, "spatial")
    state = trained(rig, config)
    folder = rig.module("nodes.native.files").FOLDER
    (place, *_) = folder_paths.get_folder_paths(folder)
    path = Path(place) / "xl_spatial.safetensors"
    save_adapter(
        path,
        FlowAdapterConfig.from_dict(config.to_dict()),
        state,
        training=AdapterTrainingConfig("tiny_xl", 3, 10),
        schedule=ScheduleConfig(prediction_type="v_prediction"),
        resolution=(64, 64),
        frames=3,
    )
    try:
        assert path.name in rig.module("nodes.native.files").list_files()
        (patched,) = rig.run("S2DMApplyFlowAdapter", model=model, adapter=path.name)
        assert "predicts v_prediction, and the MODEL predicts epsilon" in caplog.text
        flow = rig.flow(2)
        direct = adapter.apply_adapter(model, config, state)
        assert torch.equal(sample(rig, patched, flow), sample(rig, direct, flow))
        with pytest.raises(ValueError, match=r"^Apply Flow Adapter .*another U-Net.*don't fit"):
            rig.run("S2DMApplyFlowAdapter", model=rig.plain_model(), adapter=path.name)
    finally:
        path.unlink()


def test_levels_that_the_features_leave_out_are_refused(rig, adapter, model):
    config = dataclasses.replace(config_for(adapter, model, "spatial"), levels=(0, 2))
    with pytest.raises(ValueError, match=r"levels \[0, 2\], the MODEL's layers are at \[1, 2\]"):
        adapter.apply_adapter(model, config, trained(rig, config))


def test_models_of_videos_are_refused(adapter, model, monkeypatch):
    unet = model.get_model_object("diffusion_model")
    monkeypatch.setattr(unet.input_blocks[0], "time_stack", True, raising=False)
    with pytest.raises(adapter.AdapterError, match="Stable Video Diffusion"):
        adapter.adapter_config_for(model)
