"""Sampling of stage 1."""

import dataclasses

import pytest
import torch
from random_checkpoint import TINY
from torch import nn

from s2dm.models import FLOW_SAMPLERS, ScheduleConfig, constrain, encode_flow
from s2dm.pipelines import flow_scheduler, generate_flow
from s2dm.pipelines.modules import build_flow_generator
from s2dm.sector import implied_prediction

CONFIG = TINY.flow_generator
TEXT = torch.zeros(2, CONFIG.text_dim)
REFERENCE = torch.zeros(2, CONFIG.reference_channels, 8, 8)


class Oracle(nn.Module):
    """Knows the clean clip: answers with the prediction that implies it."""

    def __init__(self, config, clean):
        super().__init__()
        self.config, self.clean = config, clean
        self.anchor = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, sample, timesteps, reference, text, motion):
        schedule = self.config.schedule
        alphas = schedule.alphas_cumprod()
        self.calls.append((timesteps.tolist(), text is None, reference, motion))
        alpha_bar = alphas[timesteps.long()]
        return implied_prediction(self.clean, sample, alpha_bar, schedule.prediction_type)


def _clean(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(2, CONFIG.frames, 3, *CONFIG.size, generator=generator)
    return constrain(clean, CONFIG)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
def test_a_network_that_knows_the_clip_gets_it_back(sampler, prediction, schedule):
    process = ScheduleConfig(beta_schedule=schedule, prediction_type=prediction)
    config = dataclasses.replace(CONFIG, schedule=process)
    oracle = Oracle(config, _clean())
    sample = generate_flow(oracle, flow_scheduler(process, sampler), TEXT, REFERENCE, steps=10)
    torch.testing.assert_close(sample, oracle.clean, rtol=2e-3, atol=2e-3)
    assert len(oracle.calls) == 10
    first = 909 if sampler == "lfdm" else 999
    assert oracle.calls[0][0] == [first, first]


def test_frame_1_stays_still_whatever_the_network_says():
    torch.manual_seed(0)
    network = build_flow_generator(CONFIG).eval()
    scheduler = flow_scheduler(CONFIG.schedule)
    sample = generate_flow(network, scheduler, TEXT, REFERENCE, steps=4)
    still = encode_flow(torch.zeros(1, 1, 3, *CONFIG.size), CONFIG)
    torch.testing.assert_close(sample[:, :1], still.expand(2, -1, -1, -1, -1))
    assert (sample[:, 1:] - still).abs().mean() > 0.1


def test_guidance_asks_for_the_null_text_only_where_it_counts():
    oracle = Oracle(CONFIG, _clean())
    scheduler = flow_scheduler(CONFIG.schedule, "ddim")
    generate_flow(oracle, scheduler, TEXT, REFERENCE, steps=2, guidance_scale=1.0)
    assert [null for _, null, *_ in oracle.calls] == [False, False]
    oracle.calls.clear()
    motion = torch.tensor([0.1, 0.2])
    reference = torch.ones_like(REFERENCE)
    generate_flow(oracle, scheduler, TEXT, reference, 2, guidance_scale=2.0, motion=motion)
    assert [null for _, null, *_ in oracle.calls] == [False, True, False, True]
    assert all(torch.equal(seen, reference) for *_, seen, _ in oracle.calls)
    assert all(given is motion for *_, given in oracle.calls)


@pytest.mark.parametrize("null", ["learned", "zero"])
def test_without_a_prompt_the_null_label_is_what_guidance_starts_from(null):
    torch.manual_seed(0)
    network = build_flow_generator(dataclasses.replace(CONFIG, null_text=null)).eval()
    for name, parameter in network.named_parameters():
        if "null" in name:
            nn.init.normal_(parameter)
    text = torch.randn(2, CONFIG.text_dim)

    def made(text, guidance):
        generator = torch.Generator().manual_seed(0)
        scheduler = flow_scheduler(CONFIG.schedule)
        return generate_flow(network, scheduler, text, REFERENCE, 3, guidance, generator)

    torch.testing.assert_close(made(None, 3.0), made(text, 0.0), rtol=1e-4, atol=1e-4)
    assert (made(None, 3.0) - made(text, 1.0)).abs().mean() > 1e-3


def test_the_seed_decides_the_clip():
    torch.manual_seed(0)
    network = build_flow_generator(CONFIG).eval()
    nn.init.normal_(network.flow_head.conv.weight)

    def clip(seed):
        generator = torch.Generator().manual_seed(seed)
        scheduler = flow_scheduler(CONFIG.schedule)
        return generate_flow(network, scheduler, TEXT, REFERENCE, 3, generator=generator)

    assert torch.equal(clip(1), clip(1))
    assert not torch.allclose(clip(1), clip(2))


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="one of"):
        flow_scheduler(CONFIG.schedule, "euler")
