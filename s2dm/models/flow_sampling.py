"""How stage 1 is sampled: what both engines take, and in which limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, tensor

from .config.stage1 import FlowGeneratorConfig

FLOW_SAMPLERS = ("dpmpp_2m", "ddim", "lfdm")
"""DPM-Solver++ of second order, for few steps; DDIM; and what LFDM does, with fresh noise at every
step (see `lfdm_sampling.py`)."""

MAX_FRAMES = 64
"""The longest clip. Stage 1 always makes as many frames as it was trained with, and what lies
between them is linear motion: further apart, it shows."""


@dataclass(frozen=True)
class FlowSampling:
    """Settings of stage 1.

    steps: of the sampler, at most as many as the network's noise schedule has.
    guidance_scale: how far to go from the null text to the prompt; the reference frame is kept.
        1 turns guidance off.
    sampler: one of `FLOW_SAMPLERS`.
    motion_strength: how much moves, as a multiple of the mean motion of the training clips. None
        leaves it open, as the data have it. For a number the flow generator must have been
        trained with this input.
    """

    steps: int = 20
    guidance_scale: float = 1.0
    sampler: str = FLOW_SAMPLERS[0]
    motion_strength: float | None = None

    def check(self, config: FlowGeneratorConfig, num_frames: int) -> None:
        """Raise ValueError unless the network can be sampled so, for a clip of so many frames."""
        if not isinstance(num_frames, int) or not 1 <= num_frames <= MAX_FRAMES:
            raise ValueError(
                f"expected 1 to {MAX_FRAMES} frames, got {num_frames!r}. For a longer clip, "
                "interpolate the frames of this one, or take the flow of another clip."
            )
        if not 1 <= self.steps <= config.schedule.steps:
            raise ValueError(
                f"expected 1 to {config.schedule.steps} steps of stage 1, as many as its noise "
                f"schedule has, got {self.steps}."
            )
        if self.sampler not in FLOW_SAMPLERS:
            raise ValueError(
                f"expected a sampler of stage 1 among {', '.join(FLOW_SAMPLERS)}, got "
                f"{self.sampler!r}."
            )
        strength = self.motion_strength
        if strength is None:
            return
        if not math.isfinite(strength) or strength < 0:
            raise ValueError(f"motion_strength: expected a number from 0, got {strength}.")
        if not config.motion_strength or config.motion == 0:
            raise ValueError(
                f"motion_strength: expected none, got {strength:g}. The flow generator of this "
                "checkpoint was trained without that input: leave it out, and scale the flow "
                "instead."
            )

    def motion(self, config: FlowGeneratorConfig) -> Tensor | None:
        """Motion strength as the network reads it: mean motion in half-frames, (1,)."""
        if self.motion_strength is None:
            return None
        return tensor([self.motion_strength * config.motion])


def check_reference(config: FlowGeneratorConfig, channels: int, features: str) -> None:
    """Raise ValueError unless the network reads these features of the reference frame."""
    if config.reference_channels != channels:
        raise ValueError(
            f"flow generator: expected {channels} reference channels, {features}, got "
            f"{config.reference_channels}. It was trained on features of another encoder: "
            "train it on these."
        )
