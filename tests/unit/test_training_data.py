"""Data sets by name, and the cache of their clips."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_training import Squares, data_config
from torch.utils.data import Subset

from s2dm.data import DataConfig, build_dataset, held_out_clips, register_dataset
from s2dm.flow import estimate_flow
from s2dm.settings import SettingsError
from s2dm.training.cache import (
    CONDITION_SIZE,
    ClipCache,
    build_clip_cache,
    clip_latents,
    training_clips,
)
from s2dm.training.config import TrainingConfig


def test_unknown_data_set_lists_the_known():
    with pytest.raises(SettingsError, match=r"unknown data set 'films'.*puppets"):
        build_dataset(DataConfig(name="films"))


@pytest.mark.parametrize("option", ["colour", "takes"])
def test_unknown_option_of_the_puppets_lists_the_known(option):
    with pytest.raises(SettingsError, match=f"unknown option '{option}'.*first_take"):
        build_dataset(DataConfig(options={option: 2}))


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 2, 5]), (9, [*range(6)])])
def test_held_out_clips_are_spread_over_the_validation_split(count, expected):
    data = data_config()
    split = Squares(data, "test")
    clips = held_out_clips(data, count)
    assert [clip.caption for clip in clips] == [f"square number {index}" for index in expected]
    for clip, index in zip(clips, expected, strict=True):
        assert torch.equal(clip.frames, split[index].frames)


def test_a_run_has_a_cache_of_its_own_unless_it_shares_one(tmp_path):
    run = {"data": data_config(), "output": str(tmp_path / "run"), "workers": 0}
    own = training_clips(TrainingConfig(**run))
    assert own.folder.parent == tmp_path / "run" / "cache"
    shared = training_clips(TrainingConfig(**run, cache=str(tmp_path / "shared")), "test")
    assert shared.folder.parent == tmp_path / "shared"
    assert shared.folder.name.startswith("squares-test-")
    assert own.folder.name.startswith("squares-train-")


def test_cache_holds_what_the_data_set_gives(tmp_path):
    data = data_config()
    cache = build_clip_cache(tmp_path, data)
    clip = Squares(data, "train")[3]
    assert len(cache) == 6
    assert cache.captions[3] == clip.caption
    assert torch.equal(torch.from_numpy(cache.frames[3].copy()), clip.frames)
    expected = clip.flow.condition(88, 56)
    assert torch.allclose(torch.from_numpy(cache.conditions[3].copy()).float(), expected, atol=1e-3)


def test_interrupted_cache_goes_on(tmp_path, monkeypatch):
    data = data_config()
    monkeypatch.setattr(Squares, "fail_after", Squares.asked + 4)
    with pytest.raises(RuntimeError):
        build_clip_cache(tmp_path, data)
    monkeypatch.setattr(Squares, "fail_after", None)
    done_before = Squares.asked
    cache = build_clip_cache(tmp_path, data)
    # One clip is rendered to learn the shapes; three were there already.
    assert Squares.asked - done_before == 1 + 3
    assert cache.captions == [f"square number {i}" for i in range(6)]
    build_clip_cache(tmp_path, data)
    assert Squares.asked - done_before == 4
    other = build_clip_cache(tmp_path, dataclasses.replace(data, size=16))
    assert isinstance(other, ClipCache) and other.frames.shape[-1] == 16


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, []),
        (1 / 3, [2, 5]),
        (0.4, [2, 4]),
        (0.5, [1, 3, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_share_of_the_clips_carries_estimated_flow(tmp_path, share, expected):
    data = data_config(estimated_flow=share)
    cache = build_clip_cache(tmp_path, data)
    clips = Squares(data, "train")
    estimated = []
    for number in range(len(clips)):
        clip = clips[number]
        given, guessed = (
            flow.condition(*CONDITION_SIZE).half()
            for flow in (clip.flow, estimate_flow(clip.pixels))
        )
        assert not torch.equal(given, guessed)
        stored = torch.from_numpy(cache.conditions[number].copy())
        if torch.equal(stored, guessed):
            estimated.append(number)
        else:
            assert torch.equal(stored, given)
    assert estimated == expected


def test_estimated_flow_has_a_cache_of_its_own(tmp_path):
    data = data_config()
    shares = (0.0, 0.5, 1.0)
    caches = [
        build_clip_cache(tmp_path, dataclasses.replace(data, estimated_flow=share))
        for share in shares
    ]
    assert len({cache.folder for cache in caches}) == len(shares)


def test_conditions_of_another_size_have_a_cache_of_their_own(tmp_path):
    data = data_config()
    usual, larger = (
        build_clip_cache(tmp_path, data, condition_size=s) for s in ((88, 56), (8, 16))
    )
    assert usual.folder == build_clip_cache(tmp_path, data).folder != larger.folder
    expected = Squares(data, "train")[1].flow.condition(8, 16).half()
    assert torch.equal(torch.from_numpy(larger.conditions[1].copy()), expected)


def test_latents_of_another_scale_or_precision_are_others(tmp_path):
    class Encoder(torch.nn.Module):
        """In place of an autoencoder: the pixels themselves."""

        def __init__(self):
            super().__init__()
            self.encoder, self.quant_conv = torch.nn.Identity(), torch.nn.Identity()

        def encode(self, frames):
            (half,) = torch.ones(1, 1) @ torch.full((1, 1), 1.001)  # rounded under autocast
            mean = frames * half
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))

    cache = build_clip_cache(tmp_path, data_config())

    def latents(scale, half):
        made = clip_latents(cache, Encoder(), scale, torch.device("cpu"), half)
        return torch.from_numpy(made.copy()).float()

    pixels = torch.from_numpy(cache.frames.copy()).float() / 127.5 - 1
    assert torch.allclose(latents(1.0, False), pixels * 1.001, atol=1e-3)
    assert torch.allclose(latents(2.0, False), pixels * 2.002, atol=2e-3)
    assert not torch.equal(latents(2.0, True), latents(2.0, False))
    assert torch.allclose(latents(2.0, True), pixels * 2, atol=2e-3)


def test_a_caption_that_was_cut_short_is_made_again(tmp_path):
    data = data_config()
    folder = build_clip_cache(tmp_path, data).folder
    (folder / "captions.json").unlink()
    lines = folder / "captions.part.jsonl"
    lines.write_text(lines.read_text()[:-9])
    cache = build_clip_cache(tmp_path, data)
    assert cache.captions == [f"square number {i}" for i in range(6)]
    assert cache.frames[5].any()


def test_a_full_disk_is_named_before_anything_is_prepared(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr("s2dm.training.cache.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"0\.0 GB are free there. Make room"):
        build_clip_cache(tmp_path, data_config())


def test_what_could_not_be_reserved_is_begun_again(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s2dm.training.cache.os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        build_clip_cache(tmp_path, data_config())
    assert not list(tmp_path.rglob("*.npy"))


def test_the_cache_knows_which_clips_are_elsewhere(tmp_path):
    options = {"elsewhere": 1.0}
    data = DataConfig(size=16, frames=1, split="test", options=options)
    clips = build_dataset(data)
    register_dataset("few", lambda config, split: Subset(clips, range(2)))
    cache = build_clip_cache(tmp_path, dataclasses.replace(data, name="few", options={}))
    assert cache.elsewhere.tolist() == [True, True]
    (cache.folder / "elsewhere.npy").unlink()  # as a cache of before
    assert ClipCache(cache.folder).elsewhere.tolist() == [False, False]
