"""Conversion between checkpoint files, diffusers folders and pickled weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_checkpoint import random_states, tiny_config, write_random_checkpoint
from safetensors.torch import load_file, save_file

from s2dm import cli
from s2dm.convert import ConversionError, _stored, convert
from s2dm.models import (
    PARTS,
    Checkpoint,
    CheckpointError,
    FlowGeneratorConfig,
    SamplingConfig,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from s2dm.models.lfdm import lfdm_keys
from s2dm.pipelines.attention import attach_adapter
from s2dm.pipelines.modules import build
from s2dm.settings import SettingsError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return write_random_checkpoint(path, tiny_config(flow_generator=None))


@pytest.fixture(scope="module")
def both_stages(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("both") / "both.safetensors")


@pytest.mark.parametrize("stages", ["checkpoint", "both_stages"])
def test_convert_between_file_and_folder(tmp_path, stages, request):
    checkpoint = request.getfixturevalue(stages)
    convert(checkpoint, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    first, again = load_file(checkpoint), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert read_config(tmp_path / "again.safetensors") == read_config(checkpoint)
    convert(checkpoint, tmp_path / "half.safetensors", half=True)
    half = load_file(tmp_path / "half.safetensors")
    assert half.keys() == first.keys() and {w.dtype for w in half.values()} == {torch.float16}


def test_a_recommendation_is_changed_entry_by_entry_and_kept(tmp_path, checkpoint):
    told = tmp_path / "told.safetensors"
    convert(checkpoint, told, recommend={"guidance_scale": 1.75, "flow_guidance_scale": 1.0})
    assert read_config(told).sampling == SamplingConfig(20, 1.75, 1.0)
    first, again = load_file(checkpoint), load_file(told)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    convert(told, told, recommend={"steps": 7})  # in its own place
    convert(told, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors", half=True)
    assert read_config(tmp_path / "again.safetensors").sampling == SamplingConfig(7, 1.75, 1.0)
    convert(tmp_path / "folder", tmp_path / "other.safetensors", recommend={"guidance_scale": 3.0})
    assert read_config(tmp_path / "other.safetensors").sampling == SamplingConfig(7, 3.0, 1.0)
    for recommend, message in (({"cfg": 2}, "cfg"), ({"steps": 0}, "steps: expected a whole")):
        with pytest.raises(SettingsError, match=message):
            convert(told, tmp_path / "wrong.safetensors", recommend=recommend)
    torch.save({"some.weight": torch.ones(2)}, tmp_path / "plain.pt")
    with pytest.raises(ConversionError, match="recommend no sampling"):
        convert(tmp_path / "plain.pt", tmp_path / "wrong.safetensors", recommend={"steps": 7})
    assert not (tmp_path / "wrong.safetensors").exists()


def test_a_file_keeps_its_parts_and_their_precision(tmp_path):
    """A flow adapter alone, which no pipeline could be built of."""
    config = tiny_config().adapter_only()
    adapter, target = tmp_path / "adapter.safetensors", tmp_path / "told.safetensors"
    states = {"flow_adapter": random_states(config)["flow_adapter"]}
    save_checkpoint(adapter, Checkpoint(config, states), torch.float16)
    convert(adapter, target, recommend={"guidance_scale": 4.0})
    loaded = load_checkpoint(target)
    assert loaded.config == config.recommending({"guidance_scale": 4.0})
    assert list(loaded) == ["flow_adapter"]
    weights = loaded["flow_adapter"].state
    assert weights.keys() == states["flow_adapter"].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, states["flow_adapter"][name].half())


def test_convert_reads_pickled_weights(tmp_path, checkpoint):
    config = read_config(checkpoint)
    weights = load_file(checkpoint)
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "epoch": 3, "s2dm": json.dumps(config.to_dict())}, pickled)
    convert(pickled, tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path / "model.safetensors").config == config
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    # Other weights become a plain file.
    torch.save({"some.weight": torch.ones(2)}, tmp_path / "plain.pt")
    convert(tmp_path / "plain.pt", tmp_path / "plain.safetensors", half=True)
    assert torch.equal(load_file(tmp_path / "plain.safetensors")["some.weight"], torch.ones(2))


@pytest.fixture
def stable_diffusion(tmp_path, monkeypatch) -> dict[str, Path]:
    """Plain Stable Diffusion in its three forms, of the tiny size."""
    config = tiny_config(flow_generator=None)
    monkeypatch.setattr("s2dm.convert.SD15", config)
    states = random_states(config)
    adapter = states.pop("flow_adapter")
    assert adapter
    weights = {PARTS[part].prefix + name: w for part in states for name, w in states[part].items()}
    # What such files hold beside the weights.
    extra = {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}
    save_file(weights | extra, tmp_path / "sd.safetensors")
    torch.save({"state_dict": weights | extra, "global_step": 5}, tmp_path / "sd.ckpt")
    folder = tmp_path / "sd"
    index = {"_class_name": "StableDiffusionPipeline"}
    for part in (plain := Checkpoint(config, states)):
        build(plain, part).save_pretrained(folder / part)
        index[part] = []
    (folder / "model_index.json").write_text(json.dumps(index))
    return {name: tmp_path / name for name in ("sd.safetensors", "sd.ckpt", "sd")}


@pytest.mark.parametrize("form", ["sd.safetensors", "sd.ckpt", "sd"])
def test_stable_diffusion_gets_an_adapter_without_effect(tmp_path, stable_diffusion, form):
    source, target = stable_diffusion[form], tmp_path / "out" / "s2dm.safetensors"
    convert(source, target, recommend={"steps": 7})
    made = load_checkpoint(target)
    config = made.config
    assert config.sampling.steps == 7 and form in config.data
    weights = load_file(stable_diffusion["sd.safetensors"])
    for part in ("unet", "text_encoder", "vae"):
        assert made[part].state
        for name, weight in made[part].state.items():
            assert torch.equal(weight, weights[PARTS[part].prefix + name])
    adapter = build(made, "flow_adapter")
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, config.unet.context_dim)
    flow = torch.rand(2, 3, 88, 56)
    plain, following = (build(made, "unet") for _ in range(2))
    attach_adapter(following, adapter)
    timestep = torch.tensor(500)
    with torch.no_grad():
        kwargs = {"cross_attention_kwargs": {"flow_tokens": adapter.encode(flow)}}
        expected = plain(noise, timestep, text).sample
        assert torch.equal(following(noise, timestep, text, **kwargs).sample, expected)
    again = tmp_path / "again.safetensors"
    convert(source, again)
    one, other = load_file(target), load_file(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)  # the same every time


def test_other_stable_diffusions_are_refused(tmp_path, stable_diffusion):
    weights = load_file(stable_diffusion["sd.safetensors"])
    name = "model.diffusion_model.input_blocks.0.0.weight"
    wrong = {
        "missing": {key: w for key, w in weights.items() if key != name},
        "inpainting": weights | {name: torch.zeros(32, 9, 3, 3)},
    }
    for kind, changed in wrong.items():
        save_file(changed, tmp_path / f"{kind}.safetensors")
        with pytest.raises(ConversionError, match=rf"{kind}.*Stable Diffusion 1\.x.*{name}"):
            convert(tmp_path / f"{kind}.safetensors", tmp_path / "out.safetensors")
    (tmp_path / "sd" / "text_encoder" / "config.json").unlink()
    with pytest.raises(ConversionError, match="its text_encoder"):
        convert(tmp_path / "sd", tmp_path / "out.safetensors")
    with pytest.raises(ConversionError, match=r"becomes one file.*\.safetensors"):
        convert(stable_diffusion["sd.safetensors"], tmp_path / "folder")
    assert not (tmp_path / "out.safetensors").exists()


def lfdm_pickle(path: Path, **changes: torch.Tensor | None) -> Path:
    """LFDM's diffusion model at its published size; each weight is one number, to keep it small."""
    generator = torch.Generator().manual_seed(0)
    diffusion = {
        key.lfdm: torch.rand(1, generator=generator).expand(key.lfdm_shape)
        for key in lfdm_keys(FlowGeneratorConfig())
    }
    diffusion |= {"betas": torch.rand(1000), **changes}
    diffusion = {name: weight for name, weight in diffusion.items() if weight is not None}
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"example": torch.zeros(2), "diffusion": diffusion, "optimizer_diff": optimizer}
    torch.save(content, path)
    return path


def test_convert_makes_a_flow_generator_of_lfdm(tmp_path):
    target = tmp_path / "generator.safetensors"
    pickled = lfdm_pickle(tmp_path / "flowdiff.pth")
    assert cli.main(["convert", str(pickled), str(target), "--half"]) == 0
    made = load_checkpoint(target)
    config = made.config
    assert config.flow_generator == FlowGeneratorConfig(flow="positions")
    assert config.frames == 40
    assert "LFDM" in config.data and "flowdiff.pth" in config.data
    assert list(made) == ["flow_generator"]
    source = torch.load(tmp_path / "flowdiff.pth", weights_only=True)["diffusion"]
    for key in lfdm_keys(config.flow_generator):
        weight = made["flow_generator"].state[key.ours]
        assert weight.shape == key.shape and weight.dtype == torch.float16
        assert torch.equal(weight, source[key.lfdm].half().reshape(key.shape))


def test_convert_refuses_a_diffusion_model_that_is_not_lfdms(tmp_path, capsys):
    name = "denoise_fn.mid_block1.block1.norm.weight"
    for number, change in enumerate(({name: None}, {name: torch.zeros(3)})):
        pickled = lfdm_pickle(tmp_path / f"{number}.pth", **change)
        with pytest.raises(ConversionError, match=f"LFDM's diffusion model as published.*{name}"):
            convert(pickled, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ConversionError, match=r"\.safetensors"):
        convert(lfdm_pickle(tmp_path / "whole.pth"), tmp_path / "folder")


class Evil:
    def __reduce__(self):
        return print, ("code of the pickle ran",)


def test_convert_runs_no_code_and_refuses_the_rest(tmp_path, checkpoint, capsys):
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="no diffusers folder: it has no model_index"):
        convert(tmp_path, tmp_path / "out.safetensors")
    with pytest.raises(ConversionError, match="not loaded"):
        convert(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert "code of the pickle ran" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "text.ckpt").write_text("hello")
    for source, target, message in (
        ("empty.pt", "out.safetensors", "no weights"),
        ("text.ckpt", "out.safetensors", "a short text"),
        ("missing.safetensors", "folder", "nothing at"),
        ("empty.pt", "folder", r"\.safetensors"),
        (checkpoint, "out.bin", "Can't write"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / source, tmp_path / target)
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_keep_their_precision_through_a_folder(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "half.safetensors", half=True)
    convert(tmp_path / "half.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    first, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("half", "again"))
    assert first.keys() == again.keys()
    assert {weight.dtype for weight in first.values()} == {torch.float16}
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())


def test_pickled_names_that_are_no_names_are_left_out(tmp_path):
    torch.save({0: torch.ones(1), "weight": torch.ones(2)}, tmp_path / "odd.pt")
    convert(tmp_path / "odd.pt", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == {"weight"}


def test_a_folder_of_a_variant_alone_is_read(tmp_path, checkpoint):
    from s2dm.pipelines import FlowToVideoPipeline

    pipeline = FlowToVideoPipeline.from_single_file(checkpoint, torch.float16)
    pipeline.save_pretrained(tmp_path / "folder", variant="fp16")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert {w.dtype for w in load_file(tmp_path / "again.safetensors").values()} == {torch.float16}


def test_a_variant_beside_the_whole_weights_is_left_alone(tmp_path):
    names = ("model.bin", "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors")
    for name in names:
        (tmp_path / name).touch()
    assert _stored(tmp_path.iterdir()) == (None, [])
    (tmp_path / "model.bin").unlink()
    variant, files = _stored(tmp_path.iterdir())
    assert variant == "fp16" and {file.name for file in files} == set(names[1:])
