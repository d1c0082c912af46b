"""The noise levels of a schedule: σ at any timestep, and at any part of the way."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


class NoiseLevels:
    """σ = √((1−ᾱ)/ᾱ) of a schedule, as ComfyUI counts it.

    Args:
        alphas_cumprod: ᾱ_t, (T,).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas = alphas_cumprod.double().cpu().numpy()
        self._log_sigmas = np.log((1 - alphas) / alphas) / 2

    def timestep(self, percent: float) -> float:
        """The timestep after a part of the schedule, from T−1 at 0 to 0 at 1."""
        return (1 - percent) * (len(self._log_sigmas) - 1)

    def sigma_at(self, timestep: float) -> float:
        """σ at a timestep; between two of them log σ is linear."""
        steps = np.arange(len(self._log_sigmas))
        return math.exp(np.interp(float(timestep), steps, self._log_sigmas))

    def sigma(self, percent: float) -> float:
        """σ after a part of the schedule: infinite before it begins, 0 at its end."""
        if percent <= 0:
            return math.inf
        return 0.0 if percent >= 1 else self.sigma_at(self.timestep(percent))
