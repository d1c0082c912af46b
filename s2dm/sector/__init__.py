"""The sector-shaped diffusion process: one noise for all frames, fanned out by their conditions."""

from .anchor import ANCHOR_END, Anchor, release, release_levels
from .diffusion import (
    BETA_SCHEDULES,
    add_noise,
    alphas_cumprod,
    betas,
    implied_noise,
    implied_prediction,
    predicted_x0,
    sector_loss,
    training_target,
)
from .guidance import guide
from .levels import NoiseLevels
from .noise import NOISE_SHARING, SHARED, NoiseSharing, StepNoise, next_seed, seed_of_flow
from .reference import ReferenceStates
from .sampling import sample

__all__ = [
    "ANCHOR_END",
    "BETA_SCHEDULES",
    "NOISE_SHARING",
    "SHARED",
    "Anchor",
    "NoiseLevels",
    "NoiseSharing",
    "ReferenceStates",
    "StepNoise",
    "add_noise",
    "alphas_cumprod",
    "betas",
    "guide",
    "implied_noise",
    "implied_prediction",
    "next_seed",
    "predicted_x0",
    "release",
    "release_levels",
    "sample",
    "sector_loss",
    "seed_of_flow",
    "training_target",
]
