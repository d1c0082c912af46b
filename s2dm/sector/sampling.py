"""The reverse process with any diffusers scheduler, step noise shared like the initial noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .noise import StepNoise

_REACH = 0.85  # the part of the timesteps that a schedule has to cover


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    steps: int,
    generator: torch.Generator | None = None,
    sharing: str = "shared",
    share: float = 0.5,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise a clip from ν_T, frames side by side (paper section 3.3).

    The start is the forward process applied to the zero latent at the first timestep, as
    ComfyUI has it: a schedule that starts below T starts with slightly less than unit noise.

    Args:
        denoise: the guided network: (N, C, h, w) latents as the scheduler scales them and the
            timestep, a scalar tensor → prediction of the latents' shape.
        scheduler: any diffusers scheduler; its timesteps are set here.
        noise: (N, C, h, w) from `draw_noise`, on the device and in the type to sample in.
        steps: number of sampling steps.
        generator: seeded CPU generator of the step noise of stochastic schedulers.
        sharing, share: of the step noise, as in `draw_noise`.
        on_step: called after each step with its number from 0 and the latents; may raise to stop.

    Returns:
        (N, C, h, w) clean latents.

    Raises:
        ValueError: the scheduler can't noise a clip, or so many steps don't cover its schedule.
    """
    frames = noise.shape[0]
    _check_reach(scheduler, steps)
    scheduler.set_timesteps(steps, device=noise.device)
    start = scheduler.timesteps[:1].repeat(frames)
    latents = scheduler.add_noise(torch.zeros_like(noise), noise, start)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = _brownian_noise(scheduler, latents, generator, sharing, share)
        step_noise = nullcontext()
    else:
        step_noise = StepNoise(frames, generator, sharing, share)
    # With a generator of their own, schedulers draw on its device, not on the latents'.
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    for number, timestep in enumerate(scheduler.timesteps):
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        with step_noise:
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        if on_step is not None:
            on_step(number, latents)
    return latents


def _check_reach(scheduler: Any, steps: int) -> None:
    """Refuse what would start far below T, from too little noise, and what can't start at all."""
    if not hasattr(scheduler, "add_noise"):
        raise ValueError(
            "Expected a scheduler of a diffusion process that adds noise by add_noise, such as "
            f"DDIM, got {type(scheduler).__name__}."
        )
    total = scheduler.config.num_train_timesteps
    if scheduler.config.get("timestep_spacing") != "leading":
        return
    stride = total // steps
    last = (steps - 1) * stride + scheduler.config.get("steps_offset", 0)
    if stride * steps < _REACH * total or last >= total:
        raise ValueError(
            f"{steps} steps don't cover the {total} timesteps of this schedule with its leading "
            "spacing. Take fewer, such as 20, 50 or 100."
        )


def _brownian_noise(
    scheduler: Any,
    latents: Tensor,
    generator: torch.Generator | None,
    sharing: str,
    share: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The step noise of SDE schedulers: increments of a Brownian path, one path for the clip.

    Their second-order steps ask for overlapping intervals, whose increments belong together,
    so plain draws would have the wrong distribution.
    """
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    sigmas = scheduler.sigmas[scheduler.sigmas > 0]
    seed = int(torch.randint(2**31 - 1, (), generator=generator))

    def path(like: Tensor, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        return BrownianTreeNoiseSampler(like, sigmas.min().item(), sigmas.max().item(), seed)

    if sharing == "independent":
        return path(latents, seed)
    common = path(latents[:1], seed)
    if sharing == "shared":
        return lambda sigma, sigma_next: common(sigma, sigma_next).expand_as(latents)
    own = path(latents, seed + 1)
    return lambda sigma, sigma_next: (
        share**0.5 * common(sigma, sigma_next) + (1.0 - share) ** 0.5 * own(sigma, sigma_next)
    )
