"""Everything that a checkpoint says about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...sector import NOISE_SHARING
from .adapter import AdapterTrainingConfig, FlowAdapterConfig
from .base import MOST_PIXELS, Config, is_count, is_number
from .networks import BertConfig, TextEncoderConfig, UNetConfig, VAEConfig
from .sampling import SamplingConfig, ScheduleConfig
from .stage1 import FlowGeneratorConfig, RegionMotionConfig

FORMAT_VERSION = 1
"""Version of the checkpoint format that this code writes, and the newest that it reads."""


@dataclass(frozen=True)
class S2DMConfig(Config):
    """Everything a checkpoint says about itself. A part that it does not hold is `None`.

    `text_encoder` reads the prompt for both stages, unless there is a `flow_text_encoder`, which
    reads it for stage 1. The features of the reference frame are the VAE's latents, unless there
    is a `region_motion` and the flow generator was trained on its features. `tokenizer` and
    `flow_tokenizer` are the specifications of the encoders' tokenizers (see `tokenizer.py` and
    `bert.py`); `sampling` is what the checkpoint recommends;
    `resolution` is (height, width) in pixels; `data` and `licence` are free text for people.
    `adapter_training` is known of an adapter that was trained alone, for a model of its own.
    `frames`, `noise_sharing` and `noise_share` say how stage 2 was trained. Sampling does not
    follow the last two: it shares noise unless told otherwise.
    """

    format_version: int = FORMAT_VERSION
    unet: UNetConfig | None = None
    vae: VAEConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    flow_adapter: FlowAdapterConfig | None = None
    flow_generator: FlowGeneratorConfig | None = None
    region_motion: RegionMotionConfig | None = None
    flow_text_encoder: BertConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()  # noqa: RUF009 (frozen)
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
    tokenizer: dict[str, Any] | None = None
    flow_tokenizer: dict[str, Any] | None = None
    resolution: tuple[int, int] = (128, 128)
    frames: int = 16
    noise_sharing: str = "shared"
    noise_share: float = 1.0
    data: str = ""
    licence: str = ""
    adapter_training: AdapterTrainingConfig | None = None

    def __post_init__(self) -> None:
        training = self.adapter_training
        good = training is None or isinstance(training, AdapterTrainingConfig)
        self._expect(good, "adapter_training", "base, clips and steps")
        self._expect(is_count(self.format_version), "format_version", "a whole number")
        self._expect(isinstance(self.schedule, ScheduleConfig), "schedule", "a schedule")
        self._expect(isinstance(self.sampling, SamplingConfig), "sampling", "steps and guidance")
        self._expect_positive("frames")
        self._expect_multipliers("resolution", MOST_PIXELS)
        self._expect(len(self.resolution) == 2, "resolution", "height and width")
        sharing = self.noise_sharing
        self._expect(sharing in NOISE_SHARING, "noise_sharing", f"one of {NOISE_SHARING}")
        good = is_number(self.noise_share) and 0 <= self.noise_share <= 1
        self._expect(good, "noise_share", "a number from 0 to 1")
        for name in ("data", "licence"):
            self._expect(isinstance(getattr(self, name), str), name, "text")
        for name in ("tokenizer", "flow_tokenizer"):
            value = getattr(self, name)
            self._expect(value is None or isinstance(value, Mapping), name, "a dictionary")
        if self.unet is not None and self.flow_adapter is not None:
            self._expect(
                dict(self.flow_adapter.layers).items()
                <= dict(self.unet.cross_attention_layers()).items(),
                "flow_adapter",
                f"layers among {self.unet.cross_attention_layers()}",
            )
        if self.unet is not None and self.text_encoder is not None:
            self._expect(
                self.unet.context_dim == self.text_encoder.hidden_size,
                "text_encoder",
                f"hidden_size equal to the U-Net's context_dim, {self.unet.context_dim}",
            )
        reader = self.flow_text_encoder or self.text_encoder
        if self.flow_generator is not None and reader is not None:
            self._expect(
                self.flow_generator.text_dim == reader.hidden_size,
                "flow_generator",
                f"text_dim equal to the text encoder's hidden_size, {reader.hidden_size}",
            )

    def recommending(self, entries: Mapping[str, Any]) -> S2DMConfig:
        """Return the config with these entries of `sampling` in place of its own.

        Raises:
            SettingsError: if one is unknown, or its value out of range.
        """
        return dataclasses.replace(self, sampling=self.sampling.replacing(entries))

    def adapter_only(self) -> S2DMConfig:
        """Return the config of a file that holds the flow adapter alone."""
        return dataclasses.replace(
            self,
            unet=None,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            flow_generator=None,
            region_motion=None,
            flow_text_encoder=None,
            flow_tokenizer=None,
        )
