"""The sector-shaped diffusion process: one noise for all frames, fanned out by their conditions."""

from .diffusion import add_noise, alphas_cumprod, sector_loss, training_target
from .guidance import guide
from .noise import NOISE_SHARING, StepNoise, draw_noise
from .sampling import sample

__all__ = [
    "NOISE_SHARING",
    "StepNoise",
    "add_noise",
    "alphas_cumprod",
    "draw_noise",
    "guide",
    "sample",
    "sector_loss",
    "training_target",
]
