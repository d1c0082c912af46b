"""The reverse process with any diffusers scheduler, step noise shared like the initial noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .noise import SHARED, BrownianPath, NoiseSharing, StepNoise

_REACH = 0.85  # the part of the timesteps that a schedule has to cover


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    steps: int,
    generator: torch.Generator | None = None,
    sharing: NoiseSharing = SHARED,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise a clip from ν_T, frames side by side (paper section 3.3).

    The start is the forward process applied to the zero latent at the first timestep, as
    ComfyUI has it: a schedule that starts below T starts with slightly less than unit noise.

    Args:
        denoise: the guided network: (N, C, h, w) latents as the scheduler scales them and the
            timestep, a scalar tensor → prediction of the latents' shape.
        scheduler: any diffusers scheduler; its timesteps are set here.
        noise: (N, C, h, w) from `NoiseSharing.draw`, on the device and in the type to sample in.
        steps: number of sampling steps.
        generator: seeded CPU generator of the step noise of stochastic schedulers.
        sharing: how the frames share the step noise.
        on_step: called after each step with its number from 0 and the latents; may raise to stop.

    Returns:
        (N, C, h, w) clean latents.

    Raises:
        ValueError: the scheduler can't noise a clip, or so many steps don't cover its schedule.
    """
    num_frames = noise.shape[0]
    _check_reach(scheduler, steps)
    scheduler.set_timesteps(steps, device=noise.device)
    start = scheduler.timesteps[:1].repeat(num_frames)
    latents = scheduler.add_noise(torch.zeros_like(noise), noise, start)
    step_noise: AbstractContextManager[Any] = StepNoise(num_frames, generator, sharing)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = _brownian_noise(scheduler, latents, generator, sharing)
        step_noise = nullcontext()
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
    scheduler: Any, latents: Tensor, generator: torch.Generator | None, sharing: NoiseSharing
) -> BrownianPath:
    """The step noise of a scheduler that asks a Brownian path for it."""
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    sigmas = scheduler.sigmas[scheduler.sigmas > 0]
    low, high = sigmas.min().item(), sigmas.max().item()
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    return sharing.brownian(
        lambda like, seed: BrownianTreeNoiseSampler(like, low, high, seed), latents, seed
    )
