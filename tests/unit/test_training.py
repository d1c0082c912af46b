"""The trainers: settings, loop, caches, losses, and small runs from start to export."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from dataclasses import dataclass
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from s2dm.flow import FlowField, estimate_flow
from s2dm.models import (
    FlowAdapterConfig,
    S2DMConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    load_checkpoint,
    presets,
)
from s2dm.models.build import build_vae
from s2dm.training.cache import CONDITION_SIZE, ClipCache, build_clip_cache
from s2dm.training.config import (
    DataConfig,
    TrainingConfig,
    TrainingConfigError,
    config_from_dict,
    config_to_dict,
    read_config,
)
from s2dm.training.datasets import build_dataset, pixels, register_dataset
from s2dm.training.loop import EMA, Progress, RunFolder, TrainingLoop, learning_rate, step_generator
from s2dm.training.sheets import save_sheet
from s2dm.training.stage2 import Stage2Task, Stage2TrainingConfig, build_stage2_task, train_stage2
from s2dm.training.vae import (
    PyramidLoss,
    VAETrainingConfig,
    build_vae_task,
    normalise_latents,
    train_vae,
)

SIZE, FRAMES = 32, 4


@dataclass
class Clip:
    frames: Tensor
    flow: FlowField
    caption: str


class Squares:
    """Six clips of a square that moves one pixel a frame; counts how often it is asked."""

    asked = 0
    fail_after: int | None = None

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config = config
        self.seed = {"train": 0, "test": 100}[split]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Clip:
        if Squares.fail_after is not None and Squares.asked >= Squares.fail_after:
            raise RuntimeError("the disk is full")
        Squares.asked += 1
        generator = torch.Generator().manual_seed(self.seed + index)
        size, count = self.config.size, self.config.frames
        colour = torch.rand(3, 1, 1, generator=generator)
        frames = torch.full((count, 3, size, size), 0.5)
        displacement = torch.zeros(count, 2, size, size)
        for number in range(count):
            frames[number, :, 8:20, 4 + number : 16 + number] = colour
            displacement[number, 0, 8:20, 4 + number : 16 + number] = -number
        flow = FlowField(displacement, torch.zeros(count, 1, size, size))
        return Clip((frames * 255).round().to(torch.uint8), flow, f"square number {index}")


register_dataset("squares", Squares)
DATA = {"name": "squares", "size": SIZE, "frames": FRAMES}

_UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_levels=(True, False),
    num_heads=2,
    context_dim=32,
)
TINY = S2DMConfig(
    unet=_UNET,
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 1), num_res_blocks=1),
    text_encoder=TextEncoderConfig(
        hidden_size=32,
        layers=1,
        heads=2,
        intermediate_size=64,
        vocab_size=600,
        bos_token_id=598,
        eos_token_id=599,
    ),
    flow_adapter=FlowAdapterConfig.for_unet(_UNET, width=32, hidden=32),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(presets, "TINY", TINY, raising=False)
    monkeypatch.setattr(Squares, "asked", 0)
    monkeypatch.setattr(Squares, "fail_after", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _vae_config(folder, **settings) -> VAETrainingConfig:
    values = {
        "output": str(folder),
        "preset": "tiny",
        "data": DATA,
        "steps": 4,
        "batch_size": 2,
        "crop": 16,
        "mixed_precision": "no",
        "workers": 0,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_every": 2,
        "validation_clips": 2,
    }
    return config_from_dict(VAETrainingConfig, {**values, **settings})


def _stage2_config(folder, vae, **settings) -> Stage2TrainingConfig:
    values = {
        "output": str(folder),
        "preset": "tiny",
        "vae": str(vae),
        "data": DATA,
        "steps": 4,
        "clips": 3,
        "clip_frames": 2,
        "mixed_precision": "no",
        "workers": 0,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_every": 2,
        "validation_clips": 1,
        "sample_frames": 2,
        "sample_steps": 2,
        "adapter_gain": 1.0,
    }
    return config_from_dict(Stage2TrainingConfig, {**values, **settings})


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    """A VAE of the tiny preset, trained for two steps."""
    presets.TINY = TINY
    folder = tmp_path_factory.mktemp("vae")
    train_vae(_vae_config(folder, steps=2))
    return folder / "export.safetensors"


# ------------------------------------------------------------------------------- settings


def test_unknown_setting_is_named():
    with pytest.raises(TrainingConfigError, match=r"data\.'colour'"):
        config_from_dict(TrainingConfig, {"data": {"colour": 1}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps must be of type int"),
        ({"steps": True}, "steps must be of type int"),
        ({"data": 3}, "data must be a table"),
        ({"betas": 0.9}, "betas must be a list"),
        ({"schedule": "linear"}, "schedule must be"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        ({"data": {"estimated_flow": 1.2}}, "a share from 0 to 1, got 1.2"),
        ({"data": {"estimated_flow": -0.1}}, "a share from 0 to 1, got -0.1"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(TrainingConfigError, match=message):
        config_from_dict(TrainingConfig, values)


def test_stage2_settings_are_checked():
    with pytest.raises(TrainingConfigError, match="noise_sharing"):
        Stage2TrainingConfig(noise_sharing="sometimes")
    with pytest.raises(TrainingConfigError, match="train must name"):
        Stage2TrainingConfig(train=("vae",))


def test_overrides_reach_into_tables(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"steps": 5, "data": {"takes": 3}}))
    config = read_config(TrainingConfig, file, ["data.size=64", "output=somewhere", "threads=2"])
    assert (config.steps, config.data.takes, config.data.size) == (5, 3, 64)
    assert (config.output, config.threads) == ("somewhere", 2)
    assert config_from_dict(TrainingConfig, config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("name", "kind"),
    [("puppets_vae.toml", VAETrainingConfig), ("puppets_stage2.toml", Stage2TrainingConfig)],
)
def test_shipped_configs_are_valid(name, kind):
    with resources.as_file(resources.files("s2dm.training") / "configs" / name) as path:
        assert read_config(kind, path).data.name == "puppets"


def test_unknown_data_set_lists_the_known():
    with pytest.raises(TrainingConfigError, match=r"unknown data set 'films'.*puppets"):
        build_dataset(DataConfig(name="films"))


# ------------------------------------------------------------------------------- the loop


@given(st.integers(0, 99), st.floats(0, 600))
def test_learning_rate_stays_between_its_ends(step, seconds):
    config = TrainingConfig(
        steps=100, max_minutes=10, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=1
    )
    rate = learning_rate(config, Progress(step, seconds))
    assert 0.1 - 1e-9 <= rate <= 1.0
    later = learning_rate(config, Progress(step, seconds + 60))
    assert later <= rate + 1e-9


def test_learning_rate_warms_up_and_anneals_by_time():
    config = TrainingConfig(steps=10**6, max_minutes=10, learning_rate=1.0, warmup_steps=10)
    assert learning_rate(config, Progress(0, 0.0)) == pytest.approx(0.1)
    assert learning_rate(config, Progress(10, 300.0)) == pytest.approx(0.5)
    assert learning_rate(config, Progress(10, 600.0)) == pytest.approx(0.0)
    assert Progress(10, 600.0).fraction(config) == 1.0


def test_ema_follows_and_gives_the_weights_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(20):
        ema.update()
    with ema.applied():
        assert model.weight.item() > 0.95  # a fixed decay of 0.999 would be at 0.02
    assert model.weight.item() == 1.0


def test_ema_leaves_frozen_weights_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert set(EMA(model, 0.9).average) == {"weight"}


def test_step_generator_depends_on_the_place_alone():
    first = torch.rand(4, generator=step_generator(0, 7, 0, 0))
    again = torch.rand(4, generator=step_generator(0, 7, 0, 0))
    other = torch.rand(4, generator=step_generator(0, 8, 0, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_log_forgets_what_is_made_again(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append({"step": step, "loss": 1.0 / step})
    folder.forget_after(2)
    assert [r["step"] for r in folder.records()] == [1, 2]


def test_sheet_has_rows_and_columns(tmp_path):
    from PIL import Image

    save_sheet(tmp_path / "sheet.png", [torch.zeros(3, 3, 8, 8), torch.ones(2, 3, 8, 8)], gap=2)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (28, 18)
        assert image.getpixel((0, 0)) == (0, 0, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


# ------------------------------------------------------------------------------ the cache


def test_cache_holds_what_the_data_set_gives(tmp_path):
    data = config_from_dict(DataConfig, DATA)
    cache = build_clip_cache(tmp_path, data)
    clip = Squares(data, "train")[3]
    assert len(cache) == 6
    assert cache.captions[3] == clip.caption
    assert torch.equal(torch.from_numpy(cache.frames[3]), clip.frames)
    expected = clip.flow.condition(88, 56)
    assert torch.allclose(torch.from_numpy(cache.conditions[3]).float(), expected, atol=1e-3)


def test_interrupted_cache_goes_on(tmp_path, monkeypatch):
    data = config_from_dict(DataConfig, DATA)
    monkeypatch.setattr(Squares, "fail_after", 4)
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
    data = config_from_dict(DataConfig, {**DATA, "estimated_flow": share})
    cache = build_clip_cache(tmp_path, data)
    clips = Squares(data, "train")
    estimated = []
    for number in range(len(clips)):
        clip = clips[number]
        given, guessed = (
            flow.condition(*CONDITION_SIZE).half()
            for flow in (clip.flow, estimate_flow(pixels(clip.frames)))
        )
        assert not torch.equal(given, guessed)
        stored = torch.from_numpy(cache.conditions[number].copy())
        if torch.equal(stored, guessed):
            estimated.append(number)
        else:
            assert torch.equal(stored, given)
    assert estimated == expected


def test_estimated_flow_has_a_cache_of_its_own(tmp_path):
    data = config_from_dict(DataConfig, DATA)
    shares = (0.0, 0.5, 1.0)
    caches = [
        build_clip_cache(tmp_path, dataclasses.replace(data, estimated_flow=share))
        for share in shares
    ]
    assert len({cache.folder for cache in caches}) == len(shares)


# ------------------------------------------------------------------------------------ VAE


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
    task = build_vae_task(_vae_config(tmp_path, guide_steps=2))
    mean, pixels = torch.ones(1, 4, 4, 4), torch.zeros(1, 3, 16, 16)
    pulls = [float(task.model._guide(mean, pixels)) for _ in range(3)]
    assert pulls == pytest.approx([1.0, 0.5, 0.0])


def test_frozen_encoder_keeps_its_latents(tmp_path, vae_file):
    train_vae(
        _vae_config(tmp_path, checkpoint=str(vae_file), freeze_encoder=True, learning_rate=1e-2)
    )
    before, after = (
        load_checkpoint(f)[1]["vae"] for f in (vae_file, tmp_path / "export.safetensors")
    )
    same = {key: torch.equal(value, after[key]) for key, value in before.items()}
    assert all(same[key] for key in same if key.startswith(("encoder.", "quant_conv.")))
    assert not all(same[key] for key in same if key.startswith("decoder."))
    with pytest.raises(TrainingConfigError, match="needs a checkpoint"):
        build_vae_task(_vae_config(tmp_path, freeze_encoder=True))


def test_normalised_vae_is_the_same_function():
    torch.manual_seed(0)
    vae = build_vae(TINY.vae).eval()
    picture = torch.rand(4, 3, 16, 16) * 2 - 1
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
    config = _vae_config(tmp_path, motion_share=1.0, whole_frames=0.0, crop=8)
    task = build_vae_task(config)
    grey = torch.full((3, 1, 1), round(0.5 * 255) / 255)
    seen = 0
    for step in range(20):
        batch = task.batch(step_generator(0, step), torch.device("cpu"))
        assert batch["pixels"].shape == (2, 3, 8, 8)
        assert batch["noise"].shape == (2, 4, 2, 2)
        seen += sum(bool((picture != grey).any()) for picture in batch["pixels"])
    assert seen >= 36  # of 40; uniform crops meet the square about half the time


def test_whole_frames_keep_the_number_of_pixels(tmp_path):
    task = build_vae_task(_vae_config(tmp_path, whole_frames=1.0, batch_size=8, crop=16))
    batch = task.batch(step_generator(0, 0), torch.device("cpu"))
    assert batch["pixels"].shape == (2, 3, SIZE, SIZE)


def test_vae_run_writes_everything(vae_file):
    folder = vae_file.parent
    config, states = load_checkpoint(vae_file)
    assert config.vae.scaling_factor == 1.0 and set(states) == {"vae"}
    records = RunFolder(folder).records()
    assert {"loss", "kl", "psnr"} <= {key for record in records for key in record}
    for name in ("config.json", "curves.png", "state/model.safetensors"):
        assert (folder / name).exists()
    assert len(list(folder.glob("samples/*.png"))) == 1
    assert not [p for p in folder.iterdir() if p.name.startswith((".", "state."))]


def test_crop_must_fit_the_vae(tmp_path):
    with pytest.raises(TrainingConfigError, match="multiple of the VAE's factor 4"):
        build_vae_task(_vae_config(tmp_path, crop=18))


# -------------------------------------------------------------------------------- stage 2


def _stop_after(monkeypatch, steps: int, stop) -> None:
    """Call ``stop`` while the batch of step ``steps`` is drawn, which that step still ends."""
    original = Stage2Task.batch
    drawn = []

    def batch(self, generator, device):
        drawn.append(1)
        if len(drawn) == steps:
            stop()
        return original(self, generator, device)

    monkeypatch.setattr(Stage2Task, "batch", batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_uninterrupted_one(tmp_path, vae_file, monkeypatch, accumulation):
    settings = {"gradient_accumulation": accumulation, "cache": str(tmp_path / "cache")}
    whole = _stage2_config(tmp_path / "whole", vae_file, **settings)
    train_stage2(whole)
    parts = _stage2_config(tmp_path / "parts", vae_file, **settings)
    with monkeypatch.context() as patch:
        _stop_after(patch, 2 * accumulation, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_stage2(parts).step == 2
    assert not (tmp_path / "parts" / "export.safetensors").exists()
    assert train_stage2(parts).step == 4
    for part, state in load_checkpoint(tmp_path / "whole" / "export.safetensors")[1].items():
        resumed = load_checkpoint(tmp_path / "parts" / "export.safetensors")[1][part]
        assert all(torch.equal(value, resumed[key]) for key, value in state.items()), part
    records = [RunFolder(tmp_path / name).records() for name in ("whole", "parts")]
    losses = [[r["loss"] for r in log if "loss" in r] for log in records]
    assert losses[0] == losses[1]


def test_export_only_leaves_the_run_alone(tmp_path, vae_file):
    config = _stage2_config(tmp_path, vae_file, steps=2)
    train_stage2(config)
    export = tmp_path / "export.safetensors"
    before = load_file(export)
    export.unlink()
    train_stage2(dataclasses.replace(config, export_only=True, steps=100))
    after = load_file(export)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_stage2_export_is_a_whole_checkpoint(tmp_path, vae_file):
    train_stage2(_stage2_config(tmp_path, vae_file, steps=2))
    config, states = load_checkpoint(tmp_path / "export.safetensors")
    assert set(states) == {"unet", "text_encoder", "vae", "flow_adapter"}
    assert config.tokenizer["kind"] == "bpe"
    assert (config.resolution, config.frames) == ((SIZE, SIZE), FRAMES)
    assert all(t.dtype == torch.float16 for state in states.values() for t in state.values())


def test_only_the_named_parts_learn(tmp_path, vae_file):
    first = tmp_path / "first"
    train_stage2(_stage2_config(first, vae_file, steps=1))
    start = first / "export.safetensors"
    config = _stage2_config(
        tmp_path / "second", "", checkpoint=str(start), train=["flow_adapter"], steps=2
    )
    train_stage2(config)
    before = load_checkpoint(start)[1]
    after = load_checkpoint(tmp_path / "second" / "export.safetensors")[1]
    same = {
        part: all(torch.equal(value, after[part][key]) for key, value in state.items())
        for part, state in before.items()
    }
    assert same == {"unet": True, "text_encoder": True, "vae": True, "flow_adapter": False}


@pytest.fixture(scope="module")
def stage2_task(tmp_path_factory, vae_file):
    presets.TINY = TINY
    config = _stage2_config(tmp_path_factory.mktemp("stage2"), vae_file)
    return build_stage2_task(config, torch.device("cpu"))


def _batch(task, number=0, **settings):
    config = task.config
    task.config = dataclasses.replace(config, **settings)
    try:
        return task.batch(step_generator(0, number), torch.device("cpu"))
    finally:
        task.config = config


@pytest.mark.parametrize("sharing", ["shared", "independent", "mixed"])
def test_frames_share_their_noise_as_configured(stage2_task, sharing):
    noise = _batch(stage2_task, noise_sharing=sharing)["noise"]
    assert noise.shape == (3, 2, 4, 8, 8)
    assert torch.equal(noise[:, 0], noise[:, 1]) == (sharing == "shared")
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(
    ("both", "text", "flow"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_null_labels_are_dropped_together_or_alone(stage2_task, both, text, flow):
    empty = stage2_task.token_ids[-1]
    batch = _batch(stage2_task, both_null=both, text_null=text, flow_null=flow)
    assert bool((batch["token_ids"] == empty).all()) == bool(both or text)
    assert bool(batch["flow_null"].all()) == bool(both or flow)


def test_frame_one_comes_with_zero_flow(stage2_task):
    always = _batch(stage2_task, first_frame=1.0)
    assert (always["conditions"][:, 0, :2] == 0).all()
    never = _batch(stage2_task, first_frame=0.0)
    assert (never["conditions"][:, :, :2].abs().amax((2, 3, 4)) > 0).all()


def test_timesteps_cover_the_schedule(stage2_task):
    timesteps = _batch(stage2_task, clips=8)["timesteps"]
    assert sorted((timesteps * 8 // 1000).tolist()) == list(range(8))


def test_null_flow_replaces_the_tokens(stage2_task):
    model = stage2_task.model
    conditions = torch.randn(2, 3, 88, 56)
    tokens = model.flow_tokens(conditions, torch.tensor([False, True]))
    assert torch.equal(tokens[1:], model.flow_adapter.null_tokens(1))
    assert torch.allclose(tokens[:1], model.flow_adapter.encode(conditions[:1]), atol=1e-5)


def test_latents_are_those_of_the_frames(stage2_task):
    frames = stage2_task.clips.pixels(2)
    with torch.no_grad():
        expected = stage2_task.vae.encode(frames * 2 - 1).latent_dist.mode()
    got = torch.from_numpy(np.array(stage2_task.latents[2])).float()
    assert torch.allclose(got, expected, atol=5e-3)


@pytest.mark.slow
def test_stage2_learns(tmp_path, vae_file):
    config = _stage2_config(tmp_path, vae_file, steps=150, clips=8, log_every=25, ema_decay=0.98)
    train_stage2(config)
    losses = [r["loss"] for r in RunFolder(tmp_path).records() if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]


def test_diverged_run_stops(tmp_path, vae_file):
    task = build_stage2_task(_stage2_config(tmp_path, vae_file), torch.device("cpu"))
    loop = TrainingLoop(task.config, task)
    loop._collect({"loss": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        loop._write_log()
