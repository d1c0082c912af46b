"""The noise schedule, as both denoisers are trained on it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.config import ScheduleConfig


def alpha_bars(schedule: ScheduleConfig) -> Tensor:
    """ᾱ_t of every timestep, (steps,) float32."""
    return schedule.alphas_cumprod()


def draw_timesteps(count: int, schedule: ScheduleConfig, generator: torch.Generator) -> Tensor:
    """One t for each of `count` clips, (count,) int64.

    Drawn in strata over the batch: the same distribution as one by one, and less variance.
    """
    strata = torch.randperm(count, generator=generator)
    where = (strata + torch.rand(count, generator=generator)) / count
    return (where * schedule.steps).long().clamp(max=schedule.steps - 1)
