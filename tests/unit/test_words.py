"""Words of a prompt that the bundled tokenizer doesn't know are named."""

from __future__ import annotations

import logging

import pytest
import torch
from random_checkpoint import CAPTIONS, TINY, tiny_config, write_random_checkpoint

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.data.puppets import ACTIONS, PERSONS, caption
from s2dm.flow import FlowField
from s2dm.models import FlowSampling, read_config, train_tokenizer, unknown_words


@pytest.fixture(scope="module")
def bundled():
    if not DEFAULT_CHECKPOINT.is_file():
        pytest.skip("no bundled checkpoint")
    return read_config(DEFAULT_CHECKPOINT).tokenizer


def test_every_word_of_the_captions_is_known(bundled):
    for person in range(len(PERSONS)):
        for action in range(len(ACTIONS)):
            assert unknown_words(caption(person, action), bundled) == []


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A Dragon in a turquoise coat, a dragon!", ["dragon", "in", "turquoise"]),
        ("a man is squatting", ["squatting"]),
        ("a (man:1.30), [wearing] a red coat... is squat", []),
        ("a red coat, embedding:dragon embedding:easynegative, is squat", []),
        ("a man's coat", []),
        ("ein Mädchen läuft 🏃", ["ein", "mädchen", "läuft", "🏃"]),
        ("   \n", []),
        ("", []),
    ],
)
def test_unknown_words_are_named_once_and_in_order(bundled, prompt, words):
    assert unknown_words(prompt, bundled) == words


def test_tokenizers_that_know_pieces_are_left_alone():
    assert unknown_words("a dragon", {"kind": "clip"}) == []
    assert unknown_words("a dragon", None) == []
    assert unknown_words("a dragon", train_tokenizer(CAPTIONS, 600)) == ["dragon"]


def test_the_pipeline_warns_once(tmp_path, caplog):
    from s2dm.pipelines import FlowToVideoPipeline, TextToVideoPipeline

    still, short = FlowField.zeros(2, 64, 48), {"sampling": {"steps": 1}, "seed": 0}
    path = write_random_checkpoint(tmp_path / "two.safetensors", tiny_config(flow_generator=None))
    pipeline = FlowToVideoPipeline.from_single_file(path)
    pipeline.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING, "s2dm"):
        pipeline("a man in a red shirt", still, output_type="latent", **short)
        assert not caplog.messages
        pipeline("a dragon", still, negative_prompt="ugly", output_type="latent", **short)
    (message,) = caplog.messages
    assert "doesn't know: dragon, ugly" in message
    caplog.clear()
    path = write_random_checkpoint(tmp_path / "both.safetensors", TINY)
    pipeline = TextToVideoPipeline.from_single_file(path)
    pipeline.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING, "s2dm"), torch.no_grad():
        pipeline("a dragon", 2, flow_sampling=FlowSampling(1), output_type="latent", **short)
    (message,) = caplog.messages
    assert "doesn't know: dragon." in message
