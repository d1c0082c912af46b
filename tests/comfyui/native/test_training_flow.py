"""Training stage 1 on core's objects: the node, what it leaves, and the same by the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import TINY

pytestmark = pytest.mark.comfyui

PROMPT = "a man in a red shirt is walking"


@pytest.fixture(scope="module")
def prepared(rig: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three clips of moving squares, prepared with the checkpoint's own VAE and CLIP."""
    import prepared_clips

    training = rig.module("nodes.native.training")
    files, flow, data = (rig.module(f"s2dm.{name}") for name in ("data.prepared", "flow", "data"))

    def load(number: int) -> Any:
        clip = prepared_clips.moving_clip(number, frames=4, size=64)
        field = flow.FlowField(clip.flow.displacement, clip.flow.occlusion)
        return data.Clip(clip.frames, field, f"{PROMPT} {number}")

    sources = [files.Source(f"clip {n}", f"{n}", lambda n=n: load(n)) for n in range(3)]
    folder = tmp_path_factory.mktemp("prepared")
    with torch.inference_mode():
        files.prepare_clips(folder, sources, 3, training.encoders(rig.loaded.vae, rig.loaded.clip))
    return files.PreparedClips(folder)


@pytest.fixture(autouse=True)
def tiny(rig: Any) -> Iterator[None]:
    """A preset that takes no time."""
    presets = rig.module("s2dm.models.presets")
    config = rig.module("s2dm.models").FlowGeneratorConfig
    values = dataclasses.asdict(TINY.flow_generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.FLOW_GENERATORS, "tiny", config.from_dict(values))
        yield


def train(rig: Any, clips: Any, name: str, **inputs: Any) -> tuple[Any, ...]:
    """The node, with few steps."""
    values = {
        "clip": rig.loaded.clip, "vae": rig.loaded.vae, "steps": 3, "preset": "tiny",
        "clips_per_step": 2, "clips_at_once": 1, "save_every": 2, "preview_every": 2, **inputs,
    }  # fmt: skip
    return rig.run("S2DMTrainFlowGenerator", clips=clips, name=name, **values)


def generate(rig: Any, stage1: Any, prompt: str = PROMPT) -> Any:
    reference = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    inputs = {"reference": reference, "prompt": prompt, "frames": 4, "steps": 3, "seed": 2}
    return rig.run("S2DMGenerateFlow", flow_generator=stage1, **inputs)[0]


def run_folder(name: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "s2dm_training" / name


def logged(name: str) -> list[float]:
    lines = (run_folder(name) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_node_gives_a_generator_that_its_file_gives_again(rig: Any, prepared: Any) -> None:
    stage1, file, curve = train(rig, prepared, "motion", learning_rate=1e-2)
    assert file == "motion.safetensors"
    assert curve.ndim == 4 and curve.shape[-1] == 3
    files = rig.module("nodes.native.files")
    assert file in files.list_files()
    config = rig.module("s2dm.models").read_config(files.find_file(file))
    assert "3 clips, 3 steps" in config.data
    (loaded,) = rig.run(
        "S2DMFlowGeneratorLoader", file=file, clip=rig.loaded.clip, vae=rig.loaded.vae
    )
    made = generate(rig, stage1)
    assert made.displacement.isfinite().all()
    assert torch.equal(made.displacement, generate(rig, loaded).displacement)
    other = generate(rig, stage1, "blue jeans")
    assert not torch.equal(made.displacement, other.displacement)


def test_cancelled_it_keeps_what_was_learned_and_goes_on(
    rig: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    train(rig, prepared, "whole_motion", steps=6)
    trainer = rig.module("s2dm.training.flow_generator").FlowGeneratorTrainer
    real = trainer.accumulate

    def cancelled(self: Any, batch: Any) -> float:
        if self.step == 3:
            management.interrupt_current_processing()
        return real(self, batch)

    monkeypatch.setattr(trainer, "accumulate", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(rig, prepared, "stopped_motion", steps=6, preview_every=0)
    monkeypatch.undo()
    assert "stopped_motion.safetensors" in rig.module("nodes.native.files").list_files()
    assert len(logged("stopped_motion")) == 3
    train(rig, prepared, "stopped_motion", steps=6)
    assert logged("stopped_motion") == pytest.approx(logged("whole_motion"), rel=1e-5)


def test_out_of_memory_says_what_to_change(
    rig: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = rig.module("s2dm.training.flow_generator").FlowGeneratorTrainer

    def full(self: Any, batch: Any) -> float:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")

    monkeypatch.setattr(trainer, "accumulate", full)
    with pytest.raises(ValueError, match=r"Train Flow Generator \(S2DM\): .*Choose precision"):
        train(rig, prepared, "memory_motion")


def test_what_does_not_belong_together_is_refused(rig: Any, prepared: Any, tmp_path: Path) -> None:
    import prepared_clips

    clips = prepared_clips.write_clips(tmp_path, channels=16)
    with pytest.raises(ValueError, match=r"latents of 4 channels.*got 16"):
        train(rig, clips, "other")
    with pytest.raises(ValueError, match="name of a file"):
        train(rig, prepared, "../away")
    (_, file, _) = train(rig, prepared, "fits")
    config = run_folder("fits") / "config.json"
    config.write_text(config.read_text("utf-8").replace('"flow_generator"', '"adapter"'), "utf-8")
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"a run of the same kind .* trains the adapter"):
            train(rig, prepared, "fits", resume=resume)

    class Wide:
        def tokenize(self, text: str) -> str:
            return text

        def encode_from_tokens(self, tokens: str, return_pooled: str) -> tuple[None, torch.Tensor]:
            return None, torch.zeros(1, 1280)

    load = {"file": file, "vae": rig.loaded.vae}
    with pytest.raises(ValueError, match=r"Load Flow Generator \(S2DM\): .*width 64.*width 1280"):
        rig.run("S2DMFlowGeneratorLoader", clip=Wide(), **load)
    bundled = {**load, "file": "s2dm-puppets-v3.safetensors (bundled)"}
    with pytest.raises(ValueError, match=r"Load Flow Generator \(S2DM\): .*4 reference channels"):
        rig.run("S2DMFlowGeneratorLoader", clip=rig.loaded.clip, **bundled)


def test_the_command_line_trains_the_same_weights_from_the_same_seed(
    rig: Any, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    from s2dm.models import load_checkpoint, presets
    from s2dm.training.run_folder import RunFolder
    from s2dm.training.stage1 import Stage1TrainingConfig, train_stage1

    shared = {"steps": 5, "seed": 3, "learning_rate": 1e-2}
    # On a CPU, core rounds the weights of text encoders to float16 unless told not to.
    monkeypatch.setattr(args, "fp32_text_enc", True)
    clip = rig.module("nodes.native.loading").load_all(str(rig.checkpoint)).clip
    (here, _, _) = train(rig, prepared, "same", clip=clip, **shared)
    monkeypatch.setitem(presets.FLOW_GENERATORS, "tiny", TINY.flow_generator)
    config = Stage1TrainingConfig(
        checkpoint=str(rig.checkpoint), clips_folder=str(prepared.folder),
        output=str(tmp_path), preset="tiny", clips=2, **shared, schedule="constant",
        mixed_precision="no", workers=0, sample_steps=2, log_every=1,
    )  # fmt: skip
    train_stage1(config)
    there = load_checkpoint(tmp_path / "export.safetensors")["flow_generator"]
    losses = [r["loss"] for r in RunFolder(tmp_path).records() if "loss" in r]
    assert losses == pytest.approx(logged("same"), rel=1e-4)
    state = here.networks()["flow_generator"].state_dict()
    assert there.config.displacement_scale == here.config.flow_generator.displacement_scale
    for name, weight in there.state.items():
        assert (weight.float() - state[name].float()).abs().max() <= 1e-4, name
