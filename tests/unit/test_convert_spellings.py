"""Stable Diffusion 1.x as it circulates, and files that are something else, through `convert`."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from random_checkpoint import random_states, tiny_config
from safetensors.torch import save_file

from s2dm.convert import ConversionError, convert
from s2dm.models import PARTS, CheckpointError, load_checkpoint
from s2dm.models.keys import to_diffusers

CONFIG = tiny_config(flow_generator=None)
SD = ("unet", "text_encoder", "vae")
TEXT = PARTS["text_encoder"].prefix
VAE = PARTS["vae"].prefix
UNET = PARTS["unet"].prefix

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return random_states(CONFIG)


@pytest.fixture(autouse=True)
def tiny_stable_diffusion(monkeypatch) -> None:
    monkeypatch.setattr("s2dm.convert.SD15", CONFIG)


def plain(states: dict[str, State]) -> State:
    """As Stable Diffusion's own file has them."""
    return {PARTS[part].prefix + name: w for part in SD for name, w in states[part].items()}


def renamed(weights: State, *rules: tuple[str, str]) -> State:
    """The weights with each rule (pattern, replacement) applied to their names."""
    out = {}
    for name, weight in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = weight
    return out


def as_matrices(weights: State, pattern: str) -> State:
    """1x1 convolutions as the matrices of linear layers."""
    return {
        name: w[:, :, 0, 0] if w.ndim == 4 and re.search(pattern, name) else w
        for name, w in weights.items()
    }


ATTENTION = r"mid\.attn_1\."


def vae_new(weights: State) -> State:
    """What tools write that rename the VAE half: ldm's places, diffusers' names and shapes."""
    names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    rules = [(rf"(mid\.attn_1\.){old}\.", rf"\g<1>{new}.") for old, new in names.items()]
    return renamed(as_matrices(weights, ATTENTION), *rules)


def vae_old(weights: State) -> State:
    """As diffusers had them until version 0.17."""
    names = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
    rules = [
        (rf"mid\.attn_1\.{old}\.", f"mid_block.attentions.0.{new}.") for old, new in names.items()
    ]
    return renamed(as_matrices(weights, ATTENTION), *rules)


def diffusers_names(weights: State) -> State:
    """One file with the names of diffusers' parts."""
    out = {}
    for part in SD:
        keys = PARTS[part].keys(getattr(CONFIG, part))
        prefix = PARTS[part].prefix
        state = {name.removeprefix(prefix): w for name, w in weights.items() if prefix in name}
        out |= {f"{part}.{name}": w for name, w in to_diffusers(state, keys).items()}
    return out


def moving_average(weights: State) -> State:
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.zeros_like(w)
        for name, w in weights.items()
        if name.startswith(UNET)
    }
    counts = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.tensor(3)}
    return average | counts | weights


SPELLINGS = {
    "matrices of the VAE": lambda weights: as_matrices(weights, ATTENTION),
    "new names of the VAE": vae_new,
    "old names of the VAE": vae_old,
    "matrices of the U-Net": lambda weights: as_matrices(weights, r"proj_(in|out)\."),
    "no text_model": lambda weights: renamed(weights, (r"(transformer\.)text_model\.", r"\1")),
    "no transformer": lambda weights: renamed(
        weights, (r"stage_model\.transformer", "stage_model")
    ),
    "position ids": lambda weights: (
        weights | {TEXT + "text_model.embeddings.position_ids": torch.arange(77)[None]}
    ),
    "projection of CLIP": lambda weights: weights | {TEXT + "logit_scale": torch.ones(())},
    "another prefix": lambda weights: renamed(weights, (r"^", "model.")),
    "a wrapper's prefix": lambda weights: renamed(weights, (r"^", "module.model.")),
    "diffusers' names": diffusers_names,
    "moving average": moving_average,
    "float16": lambda weights: {name: w.half() for name, w in weights.items()},
    "bfloat16": lambda weights: {name: w.bfloat16() for name, w in weights.items()},
}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(tmp_path, states, spelling, kind):
    source, target = tmp_path / f"sd.{kind}", tmp_path / "out.safetensors"
    weights = {name: w.contiguous() for name, w in SPELLINGS[spelling](plain(states)).items()}
    if kind == "ckpt":
        torch.save({"state_dict": weights, "global_step": 5}, source)
    else:
        save_file(weights, source)
    convert(source, target)
    loaded = load_checkpoint(target).states
    for part in SD:
        for name, weight in states[part].items():
            expected = weight.to(loaded[part][name].dtype)
            assert torch.equal(loaded[part][name], expected), name
    if spelling in ("float16", "bfloat16"):
        assert {w.dtype for w in loaded["unet"].values()} == {getattr(torch, spelling)}


def without(prefix: str):
    return lambda weights: {n: w for n, w in weights.items() if not n.startswith(prefix)}


FIRST = UNET + "input_blocks.0.0.weight"
CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(VAE), r"Stable Diffusion 1\.x, got no VAE\. Use a file that holds all"),
        (without(TEXT), "got no text encoder"),
        (lambda w: without(TEXT)(without(VAE)(w)), "got no text encoder and no VAE"),
        (without(VAE + "quant_conv.bias"), "got a VAE without first_stage_model.quant_conv.bias. "),
        (without(TEXT + "text_model.final"), "got a text encoder without .*final.* and 1 more"),
        (lambda w: w | {FIRST: torch.zeros(32, 9, 3, 3)}, f"got an inpainting model .*{FIRST}"),
        (lambda w: w | {FIRST: torch.zeros(32, 8, 3, 3)}, "got an InstructPix2Pix model"),
        (lambda w: w | {CONTEXT: torch.zeros(32, 1024)}, r"got Stable Diffusion 2\.x"),
        (lambda w: w | {"conditioner.embedders.0.x": torch.zeros(1)}, "got SDXL"),
        (lambda w: w | {UNET + "label_emb.0.0.weight": torch.zeros(1)}, "got SDXL"),
        (
            lambda w: without(TEXT)(w) | {"cond_stage_model.model.ln_final.bias": torch.ones(1)},
            r"got Stable Diffusion 2\.x",
        ),
        (lambda w: w | {VAE + "quant_conv.bias": torch.zeros(3)}, r"\(8,\) at .*got \(3,\)"),
        (lambda w: w | {VAE + "quant_conv.bias": torch.zeros(8).char()}, "int8 in .*quantised"),
    ],
)
def test_what_is_missing_or_another_model_is_named(tmp_path, states, change, message):
    source = tmp_path / "sd.safetensors"
    save_file(change(plain(states)), source)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_of_one_memory_are_saved(tmp_path, states):
    weights = plain(states)
    memory = torch.cat([w.flatten() for w in weights.values()])
    pieces = memory.split([w.numel() for w in weights.values()])
    shared = {n: p.view(w.shape) for (n, w), p in zip(weights.items(), pieces, strict=True)}
    torch.save(shared, tmp_path / "sd.ckpt")
    convert(tmp_path / "sd.ckpt", tmp_path / "out.safetensors")
    loaded = load_checkpoint(tmp_path / "out.safetensors").states
    assert torch.equal(loaded["vae"]["quant_conv.bias"], states["vae"]["quant_conv.bias"])


def test_a_folder_without_a_part(tmp_path, states):
    from s2dm.pipelines.modules import build_text_encoder, build_unet

    folder = tmp_path / "sd"
    for part, build in (("unet", build_unet), ("text_encoder", build_text_encoder)):
        build(getattr(CONFIG, part), states[part]).save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps({"unet": []}))
    with pytest.raises(ConversionError, match=r"sd: expected .*got no VAE"):
        convert(folder, tmp_path / "out.safetensors")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(ConversionError, match="got a git-lfs pointer"):
        convert(folder, tmp_path / "out.safetensors")
    for content in ("{", "[]"):
        (folder / "model_index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model_index\.json"):
            convert(folder, tmp_path / "out.safetensors")


class Callback:
    """Stands for what trainers pickle beside the weights."""


PAGE = b"<!DOCTYPE html><html><title>Access to this model is restricted</title></html>"


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "bin", "pth"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (PAGE, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a git-lfs pointer"),
        ("zip", "truncated"),
        ("legacy", "truncated"),
    ],
)
def test_what_is_no_file_of_weights_is_told_for_what_it_is(tmp_path, suffix, content, message):
    source = tmp_path / f"model.{suffix}"
    if isinstance(content, str):
        weights = {"a.weight": torch.ones(100)}
        torch.save(weights, source, _use_new_zipfile_serialization=content == "zip")
        content = source.read_bytes()[:-200]
    source.write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(source, tmp_path / "out.safetensors")
    told = str(caught.value)
    assert "weights_only" not in told and "trust" not in told and "\n" not in told


def test_objects_beside_the_weights_are_named_without_advice(tmp_path):
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": Callback()}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(
        ConversionError, match=r"Python objects .*\.Callback\), which could"
    ) as told:
        convert(tmp_path / "model.ckpt", tmp_path / "out.safetensors")
    assert "weights_only" not in str(told.value) and "can still be loaded" not in str(told.value)


def test_the_content_counts_not_the_ending(tmp_path, states):
    weights = plain(states)
    save_file(weights, tmp_path / "renamed.ckpt")
    torch.save(weights, tmp_path / "renamed.safetensors")
    for name in ("renamed.ckpt", "renamed.safetensors"):
        convert(tmp_path / name, tmp_path / "out.safetensors")
        loaded = load_checkpoint(tmp_path / "out.safetensors").states
        assert torch.equal(loaded["unet"]["out.2.bias"], states["unet"]["out.2.bias"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_mutated_pickle_is_converted_or_refused(tmp_path, zipped):
    whole = tmp_path / "whole.pt"
    weights = {"a.weight": torch.ones(5), "b": {"c": torch.zeros(2)}}
    torch.save({"state_dict": weights}, whole, _use_new_zipfile_serialization=zipped)
    content, source = whole.read_bytes(), Path(tmp_path / "mutated.pt")
    for number in range(400):
        chance = random.Random(number)
        changed = bytearray(content)
        for _ in range(chance.choice((1, 3))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        source.write_bytes(changed[: chance.choice((None, None, chance.randrange(len(changed))))])
        try:
            convert(source, tmp_path / "out.safetensors")
        except ConversionError as error:
            assert "mutated.pt" in str(error)
        except Exception as error:
            raise AssertionError(f"{number}: {error!r}") from error


def test_an_old_pickle_is_read(tmp_path):
    with open(tmp_path / "odd.pth", "wb") as file:
        pickle.dump({"a": 1}, file, protocol=0)
    with pytest.raises(ConversionError, match=r"odd\.pth"):
        convert(tmp_path / "odd.pth", tmp_path / "out.safetensors")
