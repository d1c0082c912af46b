"""Stage 1 of S2DM (paper, section 3.4): a prompt and a reference frame make a flow sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ..models import FLOW_SAMPLERS, FlowGenerator, ScheduleConfig, constrain, sample_as_lfdm
from ..models.flow_generator import FLOW_CHANNELS
from ..sector import (
    guide,
    implied_noise,
    implied_prediction,
    predicted_x0,
)
from .modules import tokenize


class AsLFDM:
    """In place of a scheduler: LFDM's own sampling."""

    def __init__(self, schedule: ScheduleConfig) -> None:
        self.schedule = schedule
        self.alphas_cumprod = schedule.alphas_cumprod()


def flow_scheduler(schedule: ScheduleConfig, name: str = FLOW_SAMPLERS[0]) -> Any:
    """A sampler of stage 1: DDIM, DPM-Solver++ of second order with two steps, or LFDM's.

    The timesteps of the first two end at T, because a flow is mostly low frequencies, which are
    still there long after fine detail has drowned in noise.

    Raises:
        ValueError: an unknown name.
    """
    if name == "lfdm":
        return AsLFDM(schedule)
    common = {
        "num_train_timesteps": schedule.steps,
        "trained_betas": schedule.betas().numpy(),
        "prediction_type": schedule.prediction_type,
        "timestep_spacing": "trailing",
    }
    if name == "ddim":
        return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    if name == "dpmpp_2m":
        return DPMSolverMultistepScheduler(**common, final_sigmas_type="zero")
    raise ValueError(f"Sampler of stage 1: expected one of {FLOW_SAMPLERS}, got {name!r}.")


def embed_prompts(
    text_encoder: Any,
    tokenizer: Any,
    prompts: list[str],
    device: torch.device | None = None,
) -> Tensor:
    """Prompts as the flow generator reads them: CLIP's pooled state, (B, text_dim).

    device: where the text encoder computes; None for where its weights lie.
    """
    device = device or next(text_encoder.parameters()).device
    return text_encoder(tokenize(tokenizer, prompts).to(device)).pooler_output


@torch.no_grad()
def generate_flow(
    network: FlowGenerator,
    scheduler: Any,
    text: Tensor | None,
    reference: Tensor,
    steps: int = 20,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    motion: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample flow for B clips, all frames at once.

    At every step the guess of the clean flow passes through `constrain`, so that frame 1
    stays still and the others know it (not so where the network makes positions).

    Args:
        network: the flow generator ε_φ, on the device and in the type to sample in.
        scheduler: from `flow_scheduler`, or another diffusers scheduler of that kind.
        text: (B, text_dim) from `embed_prompts` or `LFDMConditions.text`; None for the null
            label, without a prompt.
        reference: features of the reference frame (B, reference_channels, h, w).
        steps: number of sampling steps.
        guidance_scale: how far to go from the null text to the text; 1 for no guidance.
        generator: seeded CPU generator of the noise, and of that of the steps.
        motion: mean motion in half-frames (B,); None for the null label, "as in the data".
        on_step: called after each step with its number from 0 and the noisy clip; may raise to
            stop.

    Returns:
        Clean samples (B, N, 3, h, w) with the config's frames and size, for `decode_flow`.
    """
    config = network.config
    shape = (len(reference), config.frames, FLOW_CHANNELS, *config.size)
    reference = reference.to(next(network.parameters()))
    text = None if text is None else text.to(reference)
    alphas = scheduler.alphas_cumprod.to(reference.device, torch.float32)
    kind = config.schedule.prediction_type

    def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
        times, x_t = timestep.expand(len(reference)), x_t.to(reference)
        known = network(x_t, times, reference, text, motion)
        if guidance_scale == 1.0 or text is None:
            return known.float()
        nothing = network(x_t, times, reference, None, motion)
        return guide(nothing.float(), known.float(), guidance_scale)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(reference.device)

    x_t = draw()
    if isinstance(scheduler, AsLFDM):

        def seen(x_t: Tensor, time: int) -> tuple[Tensor, Tensor]:
            prediction = predict(x_t, torch.tensor(time, device=x_t.device))
            clean = predicted_x0(prediction, x_t, alphas[time], kind)
            return clean, implied_noise(prediction, x_t, alphas[time], kind)

        def told(number: int, _: Tensor, state: Tensor) -> None:
            if on_step is not None:
                on_step(number, state)

        limited = partial(constrain, config=config)
        return sample_as_lfdm(seen, x_t, config.schedule, steps, limited, draw, told)
    scheduler.set_timesteps(steps, device=reference.device)
    x_t = x_t * scheduler.init_noise_sigma
    for number, timestep in enumerate(scheduler.timesteps):
        alpha_bar = alphas[timestep.long()]
        prediction = predict(scheduler.scale_model_input(x_t, timestep), timestep)
        x0 = constrain(predicted_x0(prediction, x_t, alpha_bar, kind), config)
        prediction = implied_prediction(x0, x_t, alpha_bar, kind)
        x_t = scheduler.step(prediction, timestep, x_t).prev_sample
        if on_step is not None:
            on_step(number, x_t)
    return x_t
