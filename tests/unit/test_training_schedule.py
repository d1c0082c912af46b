"""Timesteps and noise levels, as both denoisers are trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("diffusers")

from s2dm.models import ScheduleConfig
from s2dm.sector import alphas_cumprod
from s2dm.training.schedule import LabelsAndNoise, draw_timesteps
from s2dm.training.trainer import TrainerSettings


@pytest.mark.parametrize("count", [1, 5, 16])
def test_each_part_of_the_schedule_has_its_clip(count):
    """In a batch of n there is one t in each n-th of the schedule, in any order."""
    generator = torch.Generator().manual_seed(0)
    orders = set()
    for _ in range(20):
        timesteps = draw_timesteps(count, 100 * count, generator)
        assert sorted((timesteps // 100).tolist()) == list(range(count))
        orders.add(tuple((timesteps // 100).tolist()))
    assert count == 1 or len(orders) > 1


def test_every_timestep_comes_up_alike():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_timesteps(3, 10, generator) for _ in range(1000)])
    counts = drawn.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 300).abs().max() < 60  # 3.6 standard deviations of independent draws


def test_the_seed_decides():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return draw_timesteps(8, 1000, generator).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
def test_noise_levels_are_those_of_the_schedule(name):
    schedule = ScheduleConfig(steps=50, beta_start=0.001, beta_end=0.02, beta_schedule=name)
    assert torch.equal(schedule.alphas_cumprod(), alphas_cumprod(50, 0.001, 0.02, name))


def test_labels_are_null_as_often_as_the_settings_say():
    @dataclass(frozen=True, kw_only=True)
    class Settings(LabelsAndNoise, TrainerSettings):
        pass

    settings = Settings(label_dropout=0.3, text_dropout=0.2, flow_dropout=0.1)
    text, flow = settings.draw_nulls(20_000, torch.Generator().manual_seed(0))
    for null, share in ((text & flow, 0.3), (text & ~flow, 0.2), (~text & flow, 0.1)):
        assert abs(float(null.float().mean()) - share) < 0.01
