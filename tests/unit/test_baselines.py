"""The baselines of text to video: what they learn, what they see, how they are evaluated."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

from random_checkpoint import TINY, write_random_checkpoint
from tiny_training import DATA, FRAMES

from s2dm.data.puppets import PuppetClips
from s2dm.evaluation.modes import MODES, ClipSampler, Variant
from s2dm.flow import FlowField
from s2dm.models import FlowSampling, S2DMConfig, SamplingConfig
from s2dm.settings import from_dict, read_settings
from s2dm.training.loop import step_generator
from s2dm.training.run_folder import RunFolder

# As for a script, the folder of the command; here at the end.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "baselines"))

from video_diffusion import (
    VideoDiffusion,
    VideoDiffusionConfig,
    generate_latents,
    load_network,
    save_network,
)
from video_diffusion_training import VideoDiffusionTrainingConfig, build_task, train
from warping import imagine_flow, warp_latents, warping

BASELINES = Path(__file__).resolve().parents[2] / "benchmarks" / "baselines"
CPU = torch.device("cpu")
NETWORK = {"model_channels": 16, "channel_mult": [1, 2], "num_heads": 2, "head_dim": 8,
           "norm_groups": 4}  # fmt: skip


def command(name: str):
    return runpy.run_path(str(BASELINES / f"{name}.py"))["main"]


@pytest.fixture
def modes():
    """Modes that a test adds go with it."""
    before = dict(MODES)
    yield
    MODES.clear()
    MODES.update(before)


def values(folder: Path, checkpoint: Path, **settings) -> dict:
    return {
        "output": str(folder),
        "checkpoint": str(checkpoint),
        "network": NETWORK,
        "data": DATA,
        "steps": 4,
        "clips": 3,
        "mixed_precision": "no",
        "schedule": "constant",
        "workers": 0,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_every": 1,
        "validation_clips": 2,
        "sample_steps": 2,
        **settings,
    }


def config(folder: Path, checkpoint: Path, **settings) -> VideoDiffusionTrainingConfig:
    return from_dict(VideoDiffusionTrainingConfig, values(folder, checkpoint, **settings))


def arguments(folder: Path, checkpoint: Path, name: str) -> list[str]:
    """Of train.py, for a tiny run on puppets."""
    settings = values(folder, checkpoint, steps=1)
    settings["data"] = {"size": 32, "frames": 3, "split": "test"}
    pairs = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    return [name, "--config", "", *pairs]


def make(text_dim: int = 6) -> VideoDiffusion:
    """A network, disturbed so that nothing is zero merely because it starts at zero."""
    torch.manual_seed(0)
    sizes = from_dict(VideoDiffusionConfig, {**NETWORK, "text_dim": text_dim})
    network = VideoDiffusion(sizes).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return network


# ----------------------------------------------------------------------------------- network


def test_the_default_size_is_that_of_stage_2():
    from s2dm.models import PUPPETS
    from s2dm.pipelines.modules import build_flow_adapter, build_unet

    with torch.device("meta"):
        stage_2 = (build_unet(PUPPETS.unet), build_flow_adapter(PUPPETS.flow_adapter))
        baseline = VideoDiffusion(VideoDiffusionConfig())
    expected = sum(weight.numel() for part in stage_2 for weight in part.parameters())
    count = sum(weight.numel() for weight in baseline.parameters())
    assert count == pytest.approx(expected, rel=0.05)


def test_every_frame_sees_the_others():
    network = make()
    latents = torch.randn(1, 4, 4, 8, 8)
    other = latents.clone()
    other[:, 0] += 1
    with torch.no_grad():
        change = (network(latents, torch.tensor(7)) - network(other, torch.tensor(7))).abs()
    assert change.amax((0, 2, 3, 4)).min() > 1e-4


def test_the_prompt_matters_unless_it_is_dropped():
    network, latents = make(), torch.randn(2, 3, 4, 8, 8)
    text, steps = torch.randn(2, 6), torch.tensor([5, 500])
    with torch.no_grad():
        read, nothing = network(latents, steps, text), network(latents, steps)
        mixed = network(latents, steps, text, torch.tensor([True, False]))
    assert (read - nothing).abs().amax((1, 2, 3, 4)).min() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([read[0], nothing[1]]))


def test_a_network_without_text_refuses_one():
    with pytest.raises(ValueError, match="reads no prompt"):
        make(text_dim=0)(torch.randn(1, 3, 4, 8, 8), torch.tensor(7), torch.randn(1, 6))


def test_a_seed_makes_a_clip_whose_frames_have_noise_of_their_own():
    network, text = make(), torch.randn(1, 6)

    def clip(seed: int, guidance: float = 2.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate_latents(network, text, (3, 4, 8, 8), 2, guidance, generator)

    assert torch.equal(clip(1), clip(1))
    assert (clip(1) - clip(2)).abs().mean() > 0.1
    assert (clip(1) - clip(1, 4.0)).abs().mean() > 1e-3
    assert clip(1).diff(dim=0).abs().amax((1, 2, 3)).min() > 0.1


def test_a_file_gives_back_the_network(tmp_path):
    network, path = make(), tmp_path / "network.safetensors"
    save_network(path, network, "abc")
    again, trained_on = load_network(path)
    assert trained_on == "abc" and again.config == network.config
    assert again.state_dict().keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.equal(value.half().float(), again.state_dict()[key])


def test_other_files_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"tiny.*train\.py, got another file"):
        load_network(checkpoint)
    nothing = tmp_path / "nothing.safetensors"
    nothing.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected a safetensors file"):
        load_network(nothing)
    with pytest.raises(OSError):
        load_network(tmp_path / "missing.safetensors")


# ---------------------------------------------------------------------------------- training


def test_a_batch_is_whole_clips_with_noise_in_every_frame(tmp_path, checkpoint):
    task = build_task(config(tmp_path, checkpoint, clips=64, text_dropout=0.25), CPU)
    batch = task.batch(step_generator(0, 0), CPU)
    assert batch["latents"].shape == batch["noise"].shape == (64, FRAMES, 4, 4, 4)
    assert not torch.equal(batch["noise"][:, 0], batch["noise"][:, 1])
    assert 0.5 < batch["keep_text"].float().mean() < 0.95
    for latents, text in zip(batch["latents"], batch["text"], strict=True):
        same = (torch.from_numpy(task.latents.astype("float32")) == latents).flatten(1).all(1)
        (clip,) = same.nonzero()
        assert torch.equal(text, task.texts[clip.item()])
    assert (task.texts[1:] - task.texts[:-1]).abs().amax(1).min() > 0.01


def test_the_schedule_is_that_of_stage_2(tmp_path, checkpoint):
    task = build_task(config(tmp_path, checkpoint), CPU)
    assert task.model.network.config.schedule == TINY.schedule
    assert task.model.network.config.text_dim == TINY.text_encoder.hidden_size


def test_without_text_the_text_encoder_is_not_needed(tmp_path):
    path = write_random_checkpoint(tmp_path / "vae.safetensors", S2DMConfig(vae=TINY.vae))
    task = build_task(config(tmp_path, path, text=False), CPU)
    assert task.batch(step_generator(0, 0), CPU)["text"] is None
    assert task.model.network.config.text_dim == 0
    with pytest.raises(ValueError, match="text_encoder"):
        build_task(config(tmp_path, path), CPU)


@pytest.mark.parametrize("text", [True, False])
def test_the_loss_falls_on_a_fixed_batch(tmp_path, checkpoint, text):
    task = build_task(config(tmp_path, checkpoint, text=text), CPU)
    batch = task.batch(step_generator(0, 0), CPU)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = task.model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    unused = [k for k, p in task.model.named_parameters() if p.grad is None]
    assert unused == []


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_where_one_that_was_not_does(tmp_path, checkpoint):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    cache = str(tmp_path / "cache")
    train(config(whole, checkpoint, cache=cache))
    for steps in (2, 4):
        train(config(parted, checkpoint, cache=cache, steps=steps))
    first, second = (load_network(RunFolder(run).export)[0].state_dict() for run in (whole, parted))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert "change_ratio" in RunFolder(whole).records()[-1]
    assert any((whole / "samples").glob("step_*.png"))


# ----------------------------------------------------------------------------------- warping


@pytest.fixture(scope="module")
def generator(checkpoint) -> ClipSampler:
    return ClipSampler(checkpoint, SamplingConfig(2, 2.0, 1.0), FlowSampling(3))


@pytest.fixture(scope="module")
def clip():
    return PuppetClips("test", takes=1, size=32, frames=3)[0]


def test_with_zero_flow_every_frame_is_the_reference(generator):
    reference = torch.randn(1, 4, 4, 4)
    warped = warp_latents(reference, FlowField.zeros(3, 32, 32))
    torch.testing.assert_close(warped, reference.expand(3, -1, -1, -1))
    frames = generator.pipeline.decode_latents(warped)
    decoded = generator.pipeline.decode_latents(reference)
    torch.testing.assert_close(frames, decoded.expand(3, -1, -1, -1), rtol=0, atol=1e-5)


def test_latents_move_by_cells_and_what_is_hidden_is_blank():
    reference = torch.randn(1, 4, 4, 4)
    displacement, occlusion = torch.zeros(2, 2, 32, 32), torch.zeros(2, 1, 32, 32)
    displacement[1, 0] = -8  # pixels: one cell to the right
    occlusion[1, :, :, :8] = 1
    warped = warp_latents(reference, FlowField(displacement, occlusion))
    assert torch.allclose(warped[0], reference[0])
    assert torch.allclose(warped[1, :, :, 1:], reference[0, :, :, :-1], atol=1e-6)
    assert (warped[1, :, :, 0] == 0).all()


def test_reference_and_flow_are_those_of_the_two_stages(generator, clip):
    variant, size = Variant("two-stage"), (3, 32, 32)
    frames, flow = generator.imagine(clip.caption, size, variant, 5)
    made = warping(generator, clip, variant, 5)
    torch.testing.assert_close(made.flow.displacement, flow.displacement, rtol=0, atol=1e-4)
    assert flow.magnitude().max() > 0.5
    torch.testing.assert_close(made.frames[0], frames[0], rtol=0, atol=1e-4)
    assert (made.frames[1] - frames[1]).abs().max() > 0.01
    assert torch.equal(warping(generator, clip, variant, 5).frames, made.frames)
    assert not torch.equal(warping(generator, clip, variant, 6).frames, made.frames)


def test_flow_at_another_size_than_the_clip(generator):
    """The latents cover a little more than a clip of 30 x 30 pixels."""
    clip = PuppetClips("test", takes=1, size=30, frames=3)[0]
    made = warping(generator, clip, Variant("two-stage"), 5)
    assert made.frames.shape == (3, 3, 30, 30)
    assert made.flow.displacement.shape == (3, 2, 30, 30) and made.still.shape[-2:] == (30, 30)
    reference = generator.follow(
        clip.caption, FlowField.zeros(1, 30, 30), Variant("two-stage"), 5, output_type="latent"
    )
    flow = imagine_flow(generator.pipeline, clip.caption, reference, generator.flow_sampling, 5)
    assert (flow.height, flow.width) == (32, 32)


# -------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def networks(tmp_path_factory, checkpoint) -> dict[str, Path]:
    """What train.py makes of both."""
    folder = tmp_path_factory.mktemp("networks")
    for name in ("vdm", "lvdm"):
        command("train")(arguments(folder / name, checkpoint, name))
    return {name: folder / name / "export.safetensors" for name in ("vdm", "lvdm")}


def test_the_shipped_config_is_valid():
    config = read_settings(VideoDiffusionTrainingConfig, BASELINES / "puppets.toml")
    assert config.data.name == "puppets"


def test_the_command_trains_what_it_was_told(networks):
    assert load_network(networks["vdm"])[0].config.text_dim == TINY.text_encoder.hidden_size
    assert load_network(networks["lvdm"])[0].config.text_dim == 0


def evaluated(networks: dict[str, Path], checkpoint: Path, output: Path, *more: str) -> int:
    weights = [part for name in networks for part in (f"--{name}", str(networks[name]))]
    return command("evaluate")([
        *weights, "--checkpoint", str(checkpoint), "-o", str(output), "--cpu", "--clips", "2",
        "--data", "size=32", "frames=3", "--steps", "2", "--flow-steps", "2", *more,
    ])  # fmt: skip


def test_the_command_evaluates_all_that_there_are(networks, checkpoint, tmp_path, modes, capsys):
    assert evaluated(networks, checkpoint, tmp_path, "--vdm-guidance", "3") == 0
    result = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert list(result) == ["protocol", "table", "notes", "clips"]
    assert list(result["table"]) == ["warping", "vdm", "lvdm"]
    assert {row["clips"] for row in result["table"].values()} == {2}
    # What never had a flow is not measured by one.
    for name in ("vdm", "lvdm"):
        assert set(result["table"][name]) <= {"clips", "flicker", "flicker_95", "attributes",
                                              "attributes_95"}  # fmt: skip
    assert "flow_error" in result["table"]["warping"]
    assert "guidance 3" in result["protocol"]["vdm"]
    for name in ("vdm", "lvdm"):
        assert "trained for 1 steps of 3 clips" in result["protocol"][name]
    assert "guidance" not in result["protocol"]["lvdm"]
    assert "stage 1 DPM-Solver++ 2M, 2 steps" in result["protocol"]["sampling"]
    assert "| VDM, prompt alone | 2 |" in capsys.readouterr().out
    assert (tmp_path / "sheet.jpg").exists()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(before) == 6
    assert evaluated(networks, checkpoint, tmp_path, "--vdm-guidance", "3") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == before
    assert evaluated(networks, checkpoint, tmp_path, "--modes", "vdm", "true") == 0
    added = {path.parent.name.split("-")[0] for path in set(tmp_path.rglob("*.npz")) - set(before)}
    assert added == {"vdm", "true"}  # with another guidance


def test_prompts_matter_to_vdm_and_not_to_lvdm(networks, generator, modes):
    mode = runpy.run_path(str(BASELINES / "evaluate.py"))["video_diffusion"]
    clips = PuppetClips("test", takes=1, size=32, frames=3)
    pair = [clips[0], clips[0]]
    pair[1] = type(pair[0])(**{**vars(pair[0]), "caption": clips[30].caption})
    assert pair[0].caption != pair[1].caption

    def frames(name: str, seed: int = 0) -> list[torch.Tensor]:
        make = mode(load_network(networks[name])[0], None)
        return [make(generator, clip, Variant("two-stage"), seed).frames for clip in pair]

    first, second = frames("vdm")
    assert (first - second).abs().max() > 1e-4
    first, second = frames("lvdm")
    assert torch.equal(first, second)
    assert not torch.equal(first, frames("lvdm", seed=1)[0])


def test_weights_that_do_not_belong_together_are_refused(networks, tmp_path, modes):
    other = write_random_checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(SystemExit, match=r"vae and text_encoder of other\.safetensors"):
        evaluated(networks, other, tmp_path / "out")
    with pytest.raises(SystemExit, match="lvdm"):
        evaluated({"lvdm": tmp_path / "lvdm.safetensors"}, other, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"expected the export of train\.py lvdm"):
        evaluated({"lvdm": networks["vdm"]}, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_baselines_have_no_noise_to_share(networks, checkpoint, tmp_path, modes, capsys):
    assert evaluated(networks, checkpoint, tmp_path, "--modes", "vdm:independent") == 1
    assert "vdm has no noise to share" in capsys.readouterr().err
