"""The two-stage pipeline and its files: what they hold, and what is no file of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import relative
from random_checkpoint import TINY, random_states, tiny_config, write_random_checkpoint
from safetensors.torch import load_file
from tiny_text_to_video import PROMPT, SHORT, STAGE_2, load

from s2dm.flow import FlowField
from s2dm.models import (
    Checkpoint,
    CheckpointError,
    read_config,
    save_checkpoint,
)
from s2dm.pipelines import (
    FlowToVideoPipeline,
    TextToVideoPipeline,
    open_pipeline,
)


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> TextToVideoPipeline:
    torch.set_num_threads(1)
    return load(checkpoint)


def test_a_checkpoint_without_stage_1_says_what_is_missing(tmp_path):
    path = tmp_path / "stage2.safetensors"
    write_random_checkpoint(path, tiny_config(flow_generator=None))
    message = "expected the part flow_generator.*Choose a checkpoint with both.*--clip"
    with pytest.raises(CheckpointError, match=f"stage2.safetensors: {message}"):
        TextToVideoPipeline.from_single_file(path)
    FlowToVideoPipeline.from_single_file(path).save_pretrained(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=message):
        TextToVideoPipeline.from_pretrained(tmp_path / "folder")


def test_a_checkpoint_of_stage_1_alone_says_what_is_missing(tmp_path):
    states = {"flow_generator": random_states(TINY)["flow_generator"]}
    path = tmp_path / "stage1.safetensors"
    save_checkpoint(path, Checkpoint(dataclasses.replace(TINY, tokenizer=None), states))
    with pytest.raises(CheckpointError, match=r"expected a file with unet.*flow_generator alone"):
        TextToVideoPipeline.from_single_file(path)


def test_folder_and_file_hold_the_same(tmp_path, checkpoint):
    pipeline = load(checkpoint)
    expected = pipeline(PROMPT, 3, **SHORT)

    pipeline.save_single_file(tmp_path / "again.safetensors")
    assert torch.equal(load(tmp_path / "again.safetensors")(PROMPT, 3, **SHORT).frames,
                       expected.frames)  # fmt: skip

    pipeline.save_pretrained(tmp_path / "folder")
    from_folder = TextToVideoPipeline.from_pretrained(tmp_path / "folder")
    from_folder.set_progress_bar_config(disable=True)
    # Weights of a folder lie elsewhere in memory, which changes the last digits of products.
    assert relative(from_folder(PROMPT, 3, **SHORT).frames, expected.frames) < 1e-4

    from_folder.save_single_file(tmp_path / "back.safetensors")
    first = load_file(checkpoint)
    for name in ("again.safetensors", "back.safetensors"):
        other = load_file(tmp_path / name)
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
        assert read_config(tmp_path / name) == read_config(checkpoint)


def test_stage_2_of_the_same_files_follows_flow(checkpoint, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "folder")
    stage_2 = FlowToVideoPipeline.from_pretrained(tmp_path / "folder")
    stage_2.save_single_file(tmp_path / "stage2.safetensors")
    config = read_config(tmp_path / "stage2.safetensors")
    assert config.flow_generator is None
    assert config.unet == TINY.unet
    made = pipeline(PROMPT, 3, **SHORT)
    alone = FlowToVideoPipeline.from_single_file(tmp_path / "stage2.safetensors")
    for follower in (stage_2, alone):
        follower.set_progress_bar_config(disable=True)
        again = follower(PROMPT, made.flow, **STAGE_2).frames
        assert relative(again, made.frames) < 1e-4
        still = FlowField.zeros(3, made.flow.height, made.flow.width)
        assert relative(follower(PROMPT, still, **STAGE_2).frames, again) > 1e-3


@pytest.mark.parametrize("both", [True, False])
def test_a_checkpoint_opens_as_the_pipeline_of_the_stages_it_holds(checkpoint, tmp_path, both):
    path, kind = checkpoint, TextToVideoPipeline
    if not both:
        path, kind = tmp_path / "stage2.safetensors", FlowToVideoPipeline
        write_random_checkpoint(path, tiny_config(flow_generator=None))
    opened = open_pipeline(path)
    assert type(opened) is kind
    opened.save_pretrained(tmp_path / "folder")
    weights = opened.unet.state_dict()
    for source in (str(path), tmp_path / "folder", str(tmp_path / "folder")):
        again = open_pipeline(source)
        assert type(again) is kind and again.unet.dtype == torch.float32
        there = again.unet.state_dict()
        assert there.keys() == weights.keys()
        assert all(torch.equal(there[name], weights[name]) for name in weights)
        half = open_pipeline(source, torch.float16)
        assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}


def test_what_is_no_checkpoint_does_not_open(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"is no diffusers folder: it has no model_index\.json"
    ):
        open_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: could not be read"):
        open_pipeline(tmp_path / "nowhere.safetensors")
    part = write_random_checkpoint(
        tmp_path / "part.safetensors", tiny_config(vae=None, flow_generator=None)
    )
    with pytest.raises(CheckpointError, match=r"part\.safetensors: expected a file with vae"):
        open_pipeline(part)
