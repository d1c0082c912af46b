"""The forward process and the training loss (Eq. 6 to 11)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BETA_SCHEDULES = ("scaled_linear", "linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction")


def betas(
    steps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: str = "scaled_linear",
) -> Tensor:
    """β_t for t = 0 … steps−1, a (steps,) float64 tensor; the defaults are Stable Diffusion's.

    `beta_schedule` is "scaled_linear" (linear in √β), "linear", or "cosine" (arXiv 2102.09672
    with LFDM's cap of 0.9999), which has no start and end; anything else raises ValueError.
    """
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    if beta_schedule == "cosine":
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        signal = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.9999)
    raise ValueError(
        f"The beta schedule must be one of {', '.join(BETA_SCHEDULES)}, not {beta_schedule!r}."
    )


def alphas_cumprod(
    steps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: str = "scaled_linear",
) -> Tensor:
    """ᾱ_t for t = 0 … steps−1, a (steps,) float32 tensor that falls from near 1 to near 0.

    Arguments as in `betas`. Computed in float64, because a product of a thousand float32
    factors loses the digits that small ᾱ need.
    """
    return torch.cumprod(1.0 - betas(steps, beta_start, beta_end, beta_schedule), dim=0).float()


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ν_t (Eq. 7; with one ν_t for every frame, Eq. 8).

    Args:
        x0: clean latents, any shape.
        noise: ν_t, broadcastable to x0; shared noise may have size 1 along the frames.
        alpha_bar: ᾱ_t, its leading dimensions are those of x0.
    """
    signal, spread = _roots(alpha_bar, x0)
    return signal * x0 + spread * noise


def training_target(
    x0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """What the network is asked for.

    ν_t for "epsilon", as in the paper, or √ᾱ ν − √(1−ᾱ) x_0 for "v_prediction". Shapes as in
    `add_noise`; the result has the shape of x0. ValueError for any other type.
    """
    if prediction_type == "epsilon":
        return noise.expand_as(x0)
    if prediction_type == "v_prediction":
        signal, spread = _roots(alpha_bar, x0)
        return signal * noise - spread * x0
    raise _unknown_type(prediction_type)


def predicted_x0(
    prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The clean sample that a network's prediction at x_t implies; `training_target` undone.

    Shapes as in `add_noise`. ValueError for an unknown prediction type.
    """
    signal, spread = _roots(alpha_bar, x_t)
    if prediction_type == "epsilon":
        return (x_t - spread * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - spread * prediction
    raise _unknown_type(prediction_type)


def implied_prediction(
    x0: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The prediction at x_t that implies this clean sample; `predicted_x0` undone."""
    signal, spread = _roots(alpha_bar, x_t)
    if prediction_type == "epsilon":
        return (x_t - signal * x0) / spread
    if prediction_type == "v_prediction":
        return (signal * x_t - x0) / spread
    raise _unknown_type(prediction_type)


def implied_noise(
    prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The noise that a network's prediction at x_t implies: itself for "epsilon"."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        signal, spread = _roots(alpha_bar, x_t)
        return signal * prediction + spread * x_t
    raise _unknown_type(prediction_type)


def sector_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alpha_bars: Tensor,
    prediction_type: str = "epsilon",
    weights: Tensor | None = None,
) -> Tensor:
    """‖ν_t − ε_θ(x_t^i, t, y^i, c)‖², the mean over clips, frames and elements (Eq. 11).

    Args:
        predict: ε_θ with its conditions bound: (B·N, C, h, w) latents, frames of a clip next to
            one another, and (B·N,) timesteps → a prediction of the latents' shape.
        x0: (B, N, C, h, w) clean latents of B clips.
        noise: (B, N, C, h, w), or (B, 1, C, h, w) where the frames share it.
        timesteps: (B,) integers: the frames of a clip are all at the same step of the process.
        alpha_bars: (T,) from `alphas_cumprod`.
        prediction_type: as in `training_target`.
        weights: (B, N) how much each frame counts in the mean; all the same if None.

    Returns:
        A scalar in float32, whatever the precision of the prediction.
    """
    alpha_bar = alpha_bars.to(x0.device)[timesteps]
    x_t = add_noise(x0, noise, alpha_bar)
    target = training_target(x0, noise, alpha_bar, prediction_type)
    frames = x0.shape[1]
    prediction = predict(x_t.flatten(0, 1), timesteps.repeat_interleave(frames))
    target = target.flatten(0, 1).float()
    if weights is None:
        return torch.nn.functional.mse_loss(prediction.float(), target)
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    weights = weights.flatten().to(errors)
    return (weights * errors).sum() / weights.sum().clamp_min(1)


def _roots(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1−ᾱ_t), with as many dimensions as `like`."""
    # A single level may be a number on the CPU, and with dimensions it is one no longer.
    alpha_bar = alpha_bar.to(like.device)
    alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (like.ndim - alpha_bar.ndim))
    return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


def _unknown_type(prediction_type: str) -> ValueError:
    return ValueError(
        f"The prediction type must be {' or '.join(PREDICTION_TYPES)}, not {prediction_type!r}."
    )
