"""The noise schedule, and how a checkpoint recommends to sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...sector import BETA_SCHEDULES, alphas_cumprod, betas
from .base import MOST_STEPS, Config, is_number


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """The noise schedule; the defaults are those of Stable Diffusion 1.x.

    `beta_schedule` "cosine" (LFDM's) has no use for `beta_start` and `beta_end`.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        self._expect_positive("steps", most=MOST_STEPS)
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            self._expect(is_number(value) and 0 < value < 1, name, "a number between 0 and 1")
        good = self.beta_schedule in BETA_SCHEDULES
        self._expect(good, "beta_schedule", f"one of {BETA_SCHEDULES}")
        predictions = ("epsilon", "v_prediction")
        self._expect(
            self.prediction_type in predictions, "prediction_type", f"one of {predictions}"
        )

    def betas(self) -> Tensor:
        """β_t of every timestep, (steps,) float64."""
        return betas(self.steps, self.beta_start, self.beta_end, self.beta_schedule)

    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t of every timestep, (steps,) float32."""
        return alphas_cumprod(self.steps, self.beta_start, self.beta_end, self.beta_schedule)


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How a checkpoint recommends to sample its clips; the defaults are the paper's.

    `steps` are those of stage 2. `guidance_scale` is the prompt's, `flow_guidance_scale`
    the flow's: `None` to guide both together, as in the paper. The first `flow_start` of the
    noise schedule, 0 to 1, is sampled without the flow. From there until `anchor_end`, 0 to 1,
    frames are anchored to frame 1 (0: not at all, the paper's plain method); with
    `reference_attention` they also see frame 1 in self-attention. Of an anchored clip that is given
    its flow, frame 1 is drawn first; with `key_frame` the frame that moves most is drawn before
    it, where its flow says that somebody is, and frame 1 is anchored to that one.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    flow_guidance_scale: float | None = None
    flow_start: float = 0.0
    anchor_end: float = 0.0
    reference_attention: bool = False
    key_frame: bool = False

    def __post_init__(self) -> None:
        self._expect_positive("steps", most=MOST_STEPS)
        for name in ("flow_start", "anchor_end"):
            value = getattr(self, name)
            self._expect(is_number(value) and 0 <= value <= 1, name, "a number from 0 to 1")
        for name in ("reference_attention", "key_frame"):
            self._expect(isinstance(getattr(self, name), bool), name, "true or false")
        for name in ("guidance_scale", "flow_guidance_scale"):
            value = getattr(self, name)
            none = value is None and name == "flow_guidance_scale"
            good = none or (is_number(value) and value >= 0)
            self._expect(good, name, "a number from 0")

    def replacing(self, entries: Mapping[str, Any] | None) -> SamplingConfig:
        """Return these settings with some entries in place of their own.

        Raises:
            SettingsError: if one is unknown, or its value out of range.
        """
        return SamplingConfig.from_dict({**self.to_dict(), **(entries or {})})

    def __str__(self) -> str:
        flow = "" if self.flow_guidance_scale is None else f" (flow {self.flow_guidance_scale:g})"
        start = f", flow from {self.flow_start:g}" if self.flow_start else ""
        anchor = f", anchored to {self.anchor_end:g}" if self.anchor_end else ""
        sees = ", reference attention" if self.reference_attention else ""
        key = ", from a key frame" if self.key_frame and self.anchor_end else ""
        return (
            f"DDIM, {self.steps} steps, guidance {self.guidance_scale:g}"
            f"{flow}{start}{anchor}{sees}{key}"
        )
