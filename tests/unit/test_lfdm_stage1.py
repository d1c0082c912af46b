"""LFDM as stage 1: its sampling and conditions, and a clip of two stages in diffusers."""

import dataclasses
from pathlib import Path

import lfdm_recipe
import lfdm_sampling_recipe as recipe
import numpy as np
import pytest
import torch
from lfdm_files import BERT, JOINED, WORDS
from random_checkpoint import random_states, random_weight, write_random_checkpoint
from tiny_flow_generator import on_meta

from s2dm.flow import FlowField
from s2dm.models import (
    Checkpoint,
    CheckpointError,
    FlowSampling,
    decode_flow,
    encode_flow,
    lfdm_conditions,
    lfdm_times,
    load_checkpoint,
)
from s2dm.models.bert import build_bert, mean_state, wordpiece_ids
from s2dm.models.keys import bert_keys
from s2dm.models.lfdm import from_lfdm, lfdm_keys
from s2dm.pipelines import TextToVideoPipeline, flow_scheduler, generate_flow
from s2dm.pipelines import flow_generation as engine

GOLDEN = Path(__file__).parent / "data" / "lfdm_sampling_golden.npz"


@pytest.mark.parametrize("case", recipe.SAMPLINGS)
def test_it_samples_what_lfdm_samples(case, monkeypatch):
    config = recipe.config(case)
    weights = {k.lfdm: lfdm_recipe.fill(k.lfdm, k.lfdm_shape) for k in lfdm_keys(config)}
    network = on_meta(config)
    network.load_state_dict(from_lfdm(weights, config), assign=True)
    reference, text = recipe.conditions(case)
    settings = recipe.SAMPLINGS[case]
    drawn = []

    def draw(shape, generator=None):
        drawn.append(recipe.noise(case, len(drawn)))
        assert shape == drawn[-1].shape
        return drawn[-1]

    known = [recipe.noise(case, number) for number in range(settings["steps"] + 1)]
    monkeypatch.setattr(recipe, "noise", lambda case, number: known[number])
    monkeypatch.setattr(engine.torch, "randn", draw)
    sample = generate_flow(
        network,
        flow_scheduler(config.schedule, "lfdm"),
        text,
        reference,
        settings["steps"],
        settings["guidance"],
    )
    assert len(drawn) == settings["steps"]  # none at the last step
    golden = torch.from_numpy(np.load(GOLDEN)[case])
    torch.testing.assert_close(sample.flatten()[::3], golden, rtol=0, atol=1e-4)


class Tiny(torch.nn.Module):
    """Sees noise in a clip by its neighbours, its time and its reference."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mix = torch.nn.Conv3d(3, 3, 3, padding=1)

    def forward(self, x_t, times, reference, text, motion):
        time = (times / 1000).to(x_t).view(-1, 1, 1, 1, 1)
        near = self.mix(x_t.transpose(1, 2)).transpose(1, 2)
        return torch.tanh(0.8 * x_t + 0.3 * near + reference.mean() - time)


def test_a_thousand_ancestral_steps_are_those_of_the_formula(monkeypatch):
    """All steps of the schedule, beside q(x_{t-1} | x_t, x_0) of DDPM (arXiv 2006.11239, Eq. 7).

    Written down anew here, in float64: the cosine schedule, the guess of the clean clip and its
    dynamic threshold, mean and variance of the posterior, no noise at the last step.
    """
    base = recipe.config("ddim")
    config = dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, steps=1000))
    torch.manual_seed(0)
    network = Tiny(config)
    reference, text = recipe.conditions("ddim")
    drawn = torch.randn(1000, 1, recipe.FRAMES, 3, recipe.SIZE, recipe.SIZE)
    draws = iter(drawn)
    monkeypatch.setattr(engine.torch, "randn", lambda shape, generator=None: next(draws))
    found = generate_flow(
        network, flow_scheduler(config.schedule, "lfdm"), text, reference, 1000, 1.0
    )
    assert next(draws, None) is None

    network = network.double()
    s = np.cos((np.linspace(0, 1, 1001) + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - s[1:] / s[:-1], 0.9999)
    alpha_bar = np.cumprod(1 - beta)
    x = drawn[0].double()
    for number, t in enumerate(range(999, -1, -1)):
        before = alpha_bar[t - 1] if t else 1.0
        with torch.no_grad():
            noise = network(x, torch.tensor([t]), reference.double(), None, None)
        clean = x / alpha_bar[t] ** 0.5 - (1 / alpha_bar[t] - 1) ** 0.5 * noise
        limit = max(float(np.quantile(clean.abs().numpy(), config.threshold)), 1.0)
        clean = clean.clamp(-limit, limit) / limit
        mean = clean * (beta[t] * before**0.5 / (1 - alpha_bar[t]))
        mean += x * ((1 - beta[t]) ** 0.5 * (1 - before) / (1 - alpha_bar[t]))
        x = mean
        if t:
            log_variance = np.log(beta[t] * (1 - before) / (1 - alpha_bar[t]))
            x = mean + np.exp(0.5 * log_variance) * drawn[number + 1].double()
    assert config.threshold == 0.9  # LFDM's
    torch.testing.assert_close(found.double(), x, rtol=0, atol=1e-4)


def test_bert_reads_as_lfdm_reads():
    generator = torch.Generator().manual_seed(0)
    state = {key.ldm: random_weight(key.ldm_shape, generator) for key in bert_keys(BERT)}
    encoder = build_bert(BERT, state)
    prompts = ("squat righting", "wave")
    spec = {"kind": "wordpiece", "vocab": WORDS, "lower_case": False}
    ids = [wordpiece_ids(text, spec, BERT.max_length) for text in prompts]
    assert ids == [[id for id in row if id] for row in recipe.TOKENS]
    found = torch.cat([mean_state(encoder, spec, prompt) for prompt in prompts])
    golden = torch.from_numpy(np.load(GOLDEN)["bert"])
    torch.testing.assert_close(found, golden, rtol=0, atol=1e-4)
    assert len(wordpiece_ids("wave " * 40, spec, BERT.max_length)) == BERT.max_length


def test_positions_become_displacement_and_visible_becomes_occluded():
    config = JOINED.flow_generator
    height, width = config.size
    displacement = torch.rand(3, 2, height, width) * 0.2
    occlusion = torch.rand(3, 1, height, width)
    displacement[0], occlusion[0] = 0, 0
    condition = torch.cat([displacement, occlusion], dim=1)
    sample = encode_flow(condition, config)
    assert sample[0, 0, 0, 0] == -1 and sample[0, 0, 0, -1] == 1  # where each cell is
    assert sample[0, 2].eq(1).all()  # all visible
    field = decode_flow(sample, config, height, width)
    torch.testing.assert_close(field.condition(height, width), condition, rtol=0, atol=1e-6)
    still = sample[1, :2]
    again = decode_flow(sample, config, height, width, still)
    assert again.displacement[1].abs().max() == 0


def test_the_times_are_those_of_lfdm():
    assert lfdm_times(1000, 10) == [909, 818, 727, 636, 545, 454, 363, 272, 181, 90]
    assert lfdm_times(4, 4) == [3, 2, 1, 0]


# The pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("lfdm") / "joined.safetensors"
    return write_random_checkpoint(path, JOINED)


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    torch.set_num_threads(1)
    made = TextToVideoPipeline.from_single_file(checkpoint)
    made.set_progress_bar_config(disable=True)
    return made


SHORT = {
    "sampling": {"steps": 2, "guidance_scale": 1.0},
    "flow_sampling": FlowSampling(3, sampler="lfdm"),
    "seed": 1,
}


def test_a_clip_of_two_stages_with_lfdm_as_the_first(pipeline):
    made = pipeline("squat", 16, **SHORT)
    assert made.frames.shape == (16, 3, 64, 48)
    assert isinstance(made.flow, FlowField) and len(made.flow) == 16
    assert made.flow.displacement[1:].abs().max() > 0.1
    other = pipeline("wave", 16, **SHORT).flow
    assert (other.displacement - made.flow.displacement).abs().max() > 1e-3


def test_lfdm_sees_the_picture_that_the_clip_starts_from(pipeline, monkeypatch):
    seen = []
    module = pipeline.flow_conditions.module
    read = module.reference
    monkeypatch.setattr(
        module, "reference", lambda picture: (seen.append(picture), read(picture))[1]
    )
    made = pipeline("squat", 4, **SHORT)
    assert torch.equal(seen[0][0], made.reference)
    mine = torch.rand(3, 64, 48)
    pipeline("squat", 4, reference=mine, **SHORT)
    torch.testing.assert_close(seen[1][0], mine)


def test_it_is_saved_and_loaded_as_file_and_folder(pipeline, checkpoint, tmp_path):
    expected = pipeline("squat", 4, **SHORT)
    pipeline.save_single_file(tmp_path / "again.safetensors")
    states = load_checkpoint(tmp_path / "again.safetensors").states
    before = load_checkpoint(checkpoint).states
    assert all(torch.equal(states[part][n], w) for part in before for n, w in before[part].items())
    pipeline.save_pretrained(tmp_path / "folder")
    again = TextToVideoPipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(again("squat", 4, **SHORT).frames, expected.frames)


@pytest.mark.parametrize("part", ["region_motion", "flow_text_encoder"])
def test_without_its_encoders_it_is_refused(part):
    lacking = dataclasses.replace(JOINED, **{part: None, "text_encoder": None})
    found = Checkpoint(lacking, random_states(lacking))
    with pytest.raises(CheckpointError, match=f"expected {part} beside LFDM's"):
        lfdm_conditions(found)


def test_features_of_another_size_are_refused():
    network = dataclasses.replace(JOINED.flow_generator, reference_channels=7)
    other = dataclasses.replace(JOINED, flow_generator=network)
    with pytest.raises(ValueError, match=r"expected 32 reference channels.*got 7"):
        lfdm_conditions(Checkpoint(other, random_states(other)))


def test_the_trainer_of_stage_1_refuses_it(checkpoint, tmp_path):
    from s2dm.training.stage1 import Stage1TrainingConfig, _check

    config = Stage1TrainingConfig(output=str(tmp_path), checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="holds LFDM's flow generator"):
        _check(config, JOINED)
