"""Sampling as LFDM's own code does it (arXiv 2303.13744), step for step.

With fewer steps than the schedule has it is DDIM with η = 1, with all of them the ancestral
sampler. Its peculiarities are kept, because published results were made with them: DDIM reads ᾱ
one step late, and a thresholded guess of the clean clip is joined to the noise that the network
predicted, which no longer implies it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config.sampling import ScheduleConfig

Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""A noisy clip and its time step to the clean clip and the noise that the network sees in it."""


def sample_as_lfdm(
    predict: Predict,
    noise: Tensor,
    schedule: ScheduleConfig,
    steps: int,
    limited: Callable[[Tensor], Tensor],
    draw: Callable[[], Tensor],
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample from the conditions bound in `predict`.

    Args:
        predict: of the network, before any threshold.
        noise: to start from, any shape.
        schedule: of the network.
        steps: 1 to `schedule.steps`.
        limited: what becomes of a guess of the clean clip, `constrain`.
        draw: noise of one step, shaped as the first.
        on_step: called after each step with its number from 0, the clean guess and the clip.

    Returns:
        The clean clip.
    """
    beta = schedule.betas()
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    x = noise
    times = lfdm_times(schedule.steps, steps)
    for number, (time, following) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        clean, predicted = predict(x, time)
        clean = limited(clean)
        if steps == schedule.steps:
            now, last = float(alpha_bar[time]), float(before[time])
            kept, spread = float(beta[time]), (1 - last) / (1 - now)
            x = clean * (kept * last**0.5 / (1 - now)) + x * (spread * (1 - kept) ** 0.5)
            size = (kept * spread) ** 0.5 if time else 0.0
        else:
            now, last = float(before[time]), float(before[following])
            size = ((1 - now / last) * (1 - last) / (1 - now)) ** 0.5
            x = clean * last**0.5 + predicted * (1 - last - size**2) ** 0.5
        if following or (steps == schedule.steps and time):
            x = x + draw() * size
        if on_step is not None:
            on_step(number, clean, x)
    return x


def lfdm_times(total: int, steps: int) -> list[int]:
    """The time steps at which the network is asked, the noisiest first."""
    if steps == total:
        return list(reversed(range(total)))
    return torch.linspace(0, total, steps + 2)[1:-1].int().flip(0).tolist()
