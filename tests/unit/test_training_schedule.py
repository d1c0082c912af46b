"""Timesteps and noise levels, as both denoisers are trained on them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from s2dm.models import ScheduleConfig
from s2dm.sector import alphas_cumprod
from s2dm.training.schedule import alpha_bars, draw_timesteps


@pytest.mark.parametrize("count", [1, 5, 16])
def test_each_part_of_the_schedule_has_its_clip(count):
    """In a batch of n there is one t in each n-th of the schedule, in any order."""
    schedule = ScheduleConfig(steps=100 * count)
    generator = torch.Generator().manual_seed(0)
    orders = set()
    for _ in range(20):
        timesteps = draw_timesteps(count, schedule, generator)
        assert sorted((timesteps // 100).tolist()) == list(range(count))
        orders.add(tuple((timesteps // 100).tolist()))
    assert count == 1 or len(orders) > 1


def test_every_timestep_comes_up_alike():
    schedule = ScheduleConfig(steps=10)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_timesteps(3, schedule, generator) for _ in range(1000)])
    counts = drawn.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 300).abs().max() < 60  # 3.6 standard deviations of independent draws


def test_the_seed_decides():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return draw_timesteps(8, ScheduleConfig(), generator).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
def test_noise_levels_are_those_of_the_schedule(name):
    schedule = ScheduleConfig(steps=50, beta_start=0.001, beta_end=0.02, beta_schedule=name)
    assert torch.equal(alpha_bars(schedule), alphas_cumprod(50, 0.001, 0.02, name))
