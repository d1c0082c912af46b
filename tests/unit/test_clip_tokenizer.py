"""CLIP's own tokenizer: in the package, and never fetched."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from random_checkpoint import random_states, tiny_config
from safetensors.torch import save_file
from tiny_training import stage2_config
from transformers import CLIPTokenizer

from s2dm.convert import ConversionError, convert
from s2dm.models import PARTS, read_config, train_tokenizer, write_tokenizer
from s2dm.models.presets import SD15
from s2dm.models.tokenizer import BOS, EOS, read_tokenizer, vocabulary, with_tokenizer
from s2dm.pipelines.modules import (
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    tokenize,
)
from s2dm.training.stage2 import train_stage2

CLIP = {"kind": "clip"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever asks for an address fails the test, also where the error is caught."""
    asked = []

    def unreachable(host, *_, **__):
        asked.append(host)
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert asked == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """CLIP's tokenizer as Stable Diffusion's folder has it."""
    place = tmp_path_factory.mktemp("clip") / "tokenizer"
    write_tokenizer(CLIP, place)
    return place


def test_ids_are_those_of_clip():
    """Known from the model that everybody has: what these texts are to Stable Diffusion."""
    tokenizer = build_tokenizer(SD15)
    assert tokenizer.model_max_length == 77 and len(tokenizer) == 49408
    ids = tokenize(tokenizer, ["a photo of a cat", ""])
    assert ids.shape == (2, 77)
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[1, 0] == 49406 and (ids[1, 1:] == 49407).all() and (ids[0, 6:] == 49407).all()


def test_the_vocabulary_is_whole():
    words = vocabulary(CLIP)
    assert len(words) == SD15.text_encoder.vocab_size
    assert (words[BOS], words[EOS]) == (49406, 49407)
    assert (words["!"], words["!</w>"], words["cat</w>"]) == (0, 256, 2368)


def test_a_folder_is_known_as_clips_in_either_form(folder, tmp_path):
    assert read_tokenizer(folder) == CLIP
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)  # newer ones: one file
    assert read_tokenizer(tmp_path) == CLIP


def test_another_tokenizer_of_this_kind_is_kept(tmp_path):
    spec = train_tokenizer(["a red coat", "a green coat"], 600)
    write_tokenizer(spec, tmp_path / "first")
    assert read_tokenizer(tmp_path / "first") == spec
    CLIPTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert read_tokenizer(tmp_path / "second") == spec


def test_others_are_refused_by_name(folder, tmp_path):
    words = json.loads((folder / "vocab.json").read_text("utf-8"))
    words["cat</w>"], words["dog</w>"] = words["dog</w>"], words["cat</w>"]
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path}: expected .* CLIP's kind.* other tokens"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a tokenizer of CLIP's kind"):
        read_tokenizer(tmp_path)
    with pytest.raises(OSError, match=r"vocab\.json"):
        read_tokenizer(tmp_path / "nothing")


def test_merges_that_are_missing_are_named(tmp_path, monkeypatch):
    from s2dm.models import tokenizer

    tokenizer._clip_merges.cache_clear()
    monkeypatch.setattr(tokenizer, "_CLIP_MERGES", tmp_path / "gone.gz")
    with pytest.raises(ValueError, match=r"gone\.gz, which can't be read.*complete package"):
        vocabulary(CLIP)


def test_it_is_no_larger_than_a_picture():
    from s2dm.models.tokenizer import _CLIP_MERGES

    assert _CLIP_MERGES.stat().st_size < 300_000
    assert _CLIP_MERGES.with_name("clip_merges.LICENSE.txt").is_file()


def test_a_prompt_without_words_of_the_training_is_still_read():
    ids = tokenize(build_tokenizer(SD15), ["Ça — 日本 🙂"])
    assert ids.max() == 49407 and torch.equal(ids[0, :1], torch.tensor([49406]))


@pytest.fixture
def stable_diffusion(tmp_path, monkeypatch, folder) -> Path:
    """A diffusers folder with CLIP's tokenizer and networks of the tiny size."""
    config = with_tokenizer(tiny_config(flow_generator=None), CLIP)
    monkeypatch.setattr("s2dm.convert.SD15", config)
    states = random_states(config)
    place = tmp_path / "sd"
    build_unet(config.unet, states["unet"]).save_pretrained(place / "unet")
    build_vae(config.vae, states["vae"]).save_pretrained(place / "vae")
    encoder = build_text_encoder(config.text_encoder, states["text_encoder"])
    encoder.save_pretrained(place / "text_encoder")
    shutil.copytree(folder, place / "tokenizer")
    (place / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    weights = {
        PARTS[part].prefix + name: weight
        for part in ("unet", "vae", "text_encoder")
        for name, weight in states[part].items()
    }
    save_file(weights, tmp_path / "sd.safetensors")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sd", "sd.safetensors"])
def test_stable_diffusion_is_converted_and_trained_without_network(
    tmp_path, stable_diffusion, form
):
    checkpoint = tmp_path / "s2dm.safetensors"
    convert(stable_diffusion.with_name(form), checkpoint)
    assert read_config(checkpoint).tokenizer == CLIP
    settings = {"checkpoint": str(checkpoint), "train": ["unet", "flow_adapter"], "steps": 2}
    config = stage2_config(tmp_path / "run", "", **settings)
    assert train_stage2(config).step == 2
    assert read_config(tmp_path / "run" / "export.safetensors").tokenizer == CLIP


def test_the_tokenizer_of_the_folder_is_kept_where_it_is_another(tmp_path, stable_diffusion):
    merges = (stable_diffusion / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()
    merges[-2:] = merges[:-3:-1]
    spec = {"kind": "bpe", "merges": merges[1:]}
    write_tokenizer(spec, stable_diffusion / "tokenizer")
    convert(stable_diffusion, tmp_path / "s2dm.safetensors")
    assert read_config(tmp_path / "s2dm.safetensors").tokenizer == spec
    (stable_diffusion / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ConversionError, match=r"merges\.txt.*delete the folder"):
        convert(stable_diffusion, tmp_path / "other.safetensors")
    shutil.rmtree(stable_diffusion / "tokenizer")
    convert(stable_diffusion, tmp_path / "other.safetensors")
    assert read_config(tmp_path / "other.safetensors").tokenizer == CLIP
