"""The noise schedule, as both denoisers are trained on it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import ScheduleConfig


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


def draw_frames(count: int, choices: int, generator: torch.Generator) -> list[int]:
    """Frame 1, and one frame out of each interval of a clip.

    Args:
        count: of frames that are drawn.
        choices: frames of each interval, all of them stored one after the other.
        generator: isn't asked where there is nothing to choose.
    """
    if choices == 1:
        return list(range(count))
    picked = torch.randint(choices, (count - 1,), generator=generator).tolist()
    return [0, *(1 + choices * interval + one for interval, one in enumerate(picked))]
