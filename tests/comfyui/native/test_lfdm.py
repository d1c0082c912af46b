"""LFDM as stage 1, and a region-motion model, in a real ComfyUI."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import relative
from lfdm_files import JOINED
from random_checkpoint import write_random_checkpoint

from s2dm.flow import estimate_flow
from s2dm.models import decode_flow, lfdm_conditions, load_checkpoint
from s2dm.pipelines import flow_scheduler, generate_flow
from s2dm.pipelines.modules import build
from s2dm.sector import seed_of_flow

pytestmark = pytest.mark.comfyui

ALONE = dataclasses.replace(
    JOINED, unet=None, vae=None, text_encoder=None, flow_adapter=None, tokenizer=None
)
MEASURES = dataclasses.replace(
    ALONE, flow_generator=None, flow_text_encoder=None, flow_tokenizer=None
)


@pytest.fixture(scope="module")
def lfdm(rig, tmp_path_factory):
    path = tmp_path_factory.mktemp("lfdm") / "joined.safetensors"
    return type(rig)(rig.pack, rig.nodes, write_random_checkpoint(path, JOINED))


@pytest.fixture
def loader(rig, tmp_path, monkeypatch):
    """Load a file of this config with the loader of region motion."""

    def run(config):
        path = write_random_checkpoint(tmp_path / "file.safetensors", config)
        monkeypatch.setattr(rig.module("nodes.loaders"), "find_file", lambda name: str(path))
        return path, *rig.run("S2DMRegionMotionLoader", file="file.safetensors")

    return run


def picture(height: int = 64, width: int = 48, seed: int = 0) -> torch.Tensor:
    """A smooth picture, (1, height, width, 3)."""
    coarse = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    size = {"size": (height, width), "mode": "bilinear"}
    return torch.nn.functional.interpolate(coarse, **size).movedim(1, -1)


def generate(rig, stage1, **inputs):
    arguments = {
        "prompt": "squat",
        "frames": 16,
        "steps": 4,
        "cfg": 1.0,
        "seed": 3,
        "sampler_name": "lfdm",
        **inputs,
    }
    (flow,) = rig.run("S2DMGenerateFlow", flow_generator=stage1, reference=picture(), **arguments)
    return flow


def by_diffusers(path, prompt="squat", steps=4, cfg=1.0, sampler_name="lfdm", seed=3):
    """The same flow from the other engine, which reads the same file."""
    checkpoint = load_checkpoint(path)
    settings = checkpoint.config.flow_generator
    conditions = lfdm_conditions(checkpoint)
    frame = picture().movedim(-1, 1)
    sample = generate_flow(
        build(checkpoint, "flow_generator"),
        flow_scheduler(settings.schedule, sampler_name),
        conditions.text(prompt),
        conditions.reference(frame),
        steps,
        cfg,
        torch.Generator().manual_seed(seed_of_flow(seed)),
    )
    return decode_flow(sample[0], settings, *frame.shape[2:], conditions.still(frame))


@pytest.mark.parametrize(
    "case",
    [{}, {"cfg": 3.0}, {"prompt": " "}, {"sampler_name": "ddim"}, {"seed": 8}],
    ids=["plain", "guided", "no prompt", "ddim", "seed"],
)
def test_the_engines_agree(lfdm, case):
    ours = generate(lfdm, lfdm.loaded.stage1, **case)
    theirs = by_diffusers(lfdm.checkpoint, **case).retime(16)
    assert ours.displacement.abs().max() > 1
    assert relative(ours.condition(16, 16), theirs.condition(16, 16)) <= 1e-3


def test_a_clip_of_two_stages(lfdm):
    flow = generate(lfdm, lfdm.loaded.stage1)
    assert (len(flow), flow.height, flow.width) == (16, 64, 48)
    assert flow.occlusion.unique().numel() > 100  # soft
    latents = lfdm.sample(lfdm.encode(flow))
    assert latents.shape == (16, 4, 8, 6) and torch.isfinite(latents).all()


def test_core_saves_all_of_it(lfdm, tmp_path, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_model_merging import CheckpointSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    found = lfdm.loaded
    with torch.inference_mode():
        CheckpointSave().save(found.model, found.clip, found.vae, "s2dm/saved")
    (path,) = tmp_path.rglob("*.safetensors")
    again = lfdm.module("nodes.native.loading").load_all(str(path))
    assert again.config == lfdm.loaded.config
    flow, expected = (generate(lfdm, found.stage1) for found in (again, lfdm.loaded))
    torch.testing.assert_close(flow.displacement, expected.displacement)


def test_lfdm_alone_makes_flow_for_any_stage_2(lfdm, loader):
    _, _, stage1 = loader(ALONE)
    assert stage1
    assert len(generate(lfdm, stage1)) == 16


def test_a_region_motion_model_measures_clips(rig, loader):
    path, regions, generator = loader(MEASURES)
    assert "region-motion model alone" in repr(generator)
    frames = torch.cat([picture(seed=seed) for seed in range(3)])
    (flow,) = rig.run("S2DMEstimateFlow", frames=frames, method="model", optical_flow=regions)
    network = build(load_checkpoint(path), "region_motion").eval()
    expected = estimate_flow(frames.movedim(-1, 1), network)
    torch.testing.assert_close(flow.displacement, expected.displacement)
    torch.testing.assert_close(flow.occlusion, expected.occlusion)
    assert flow.displacement[1:].abs().max() > 0.1
    assert flow.occlusion[1:].unique().numel() > 100


def test_core_can_unload_and_load_them(rig, loader):
    import comfy.model_management as management

    _, regions, stage1 = loader(ALONE)
    for patcher in (regions, stage1.conditions):
        assert patcher.model_size() > 0
        management.load_models_gpu([patcher])
        assert any(loaded.model is patcher for loaded in management.current_loaded_models)
    management.unload_all_models()


def test_a_file_without_regions_is_refused(rig, loader):
    lacking = dataclasses.replace(JOINED, region_motion=None)
    with pytest.raises(ValueError, match=r"Load Region Motion.*region_motion"):
        loader(lacking)
