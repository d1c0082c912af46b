"""What can be evaluated: each mode makes a clip, or takes the true one, to be measured.

A new way to generate is one more entry in `MODES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..flow import FlowField
from ..models import SamplingConfig, read_config
from ..sector.noise import check_sharing
from ..training.datasets import pixels
from .clip_metrics import still_region

if TYPE_CHECKING:
    from ..pipelines import FlowToVideoPipeline


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled; None is what the checkpoint recommends (see `SamplingConfig`)."""

    steps: int | None = None
    guidance: float | None = None
    flow_guidance: float | None = None
    flow_start: float | None = None
    flow_steps: int = 20
    flow_text_guidance: float = 1.0

    def filled(self, recommended: SamplingConfig) -> Sampling:
        """With what a checkpoint recommends in place of None."""
        given = {
            "steps": recommended.steps,
            "guidance": recommended.guidance_scale,
            "flow_guidance": recommended.flow_guidance_scale,
            "flow_start": recommended.flow_start,
        }
        missing = {name: value for name, value in given.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def __str__(self) -> str:
        flow = "" if self.flow_guidance is None else f" (flow {self.flow_guidance:g})"
        start = f", flow from {self.flow_start:g}" if self.flow_start else ""
        return f"DDIM, {self.steps} steps, guidance {self.guidance:g}{flow}{start}"


@dataclass(frozen=True, eq=False)
class Made:
    """A clip to measure.

    frames: (N,3,H,W) in [0,1].
    flow: what it was to follow, at the size of the frames; None for a clip that was given no flow,
        which then is not measured by any.
    still: (1,1,H,W) bool, where nothing should change; None for where the clip's own estimated
        flow finds that nothing moves.
    """

    frames: Tensor
    flow: FlowField | None
    still: Tensor | None


class Generator:
    """A checkpoint that generates clips. It is loaded when it is first needed.

    Args:
        checkpoint: a `.safetensors` file.
        sampling: how.
        chunk: frames computed at a time.
        device: to compute on.
        dtype: of the weights.
    """

    def __init__(
        self,
        checkpoint: Path,
        sampling: Sampling,
        chunk: int = 8,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint, self.sampling, self.chunk = checkpoint, sampling, chunk
        self.device, self.dtype = device, dtype

    @cached_property
    def pipeline(self) -> FlowToVideoPipeline:
        """Of both stages where the checkpoint has them."""
        from ..pipelines import FlowToVideoPipeline, TextToVideoPipeline

        both = read_config(self.checkpoint).flow_generator is not None
        kind = TextToVideoPipeline if both else FlowToVideoPipeline
        pipeline = kind.from_single_file(self.checkpoint, torch_dtype=self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def follow(
        self, prompt: str, flow: FlowField, variant: Variant, seed: int, output_type: str = "pt"
    ) -> Tensor:
        """Stage 2: frames (N,3,H,W) of a prompt and a flow, or their latents for "latent"."""
        from ..pipelines import FlowToVideoPipeline

        # Of a pipeline of both stages, too, the second alone.
        result = FlowToVideoPipeline.__call__(
            self.pipeline, prompt, flow, output_type=output_type, **self._arguments(variant, seed)
        )
        return result.frames

    def imagine(
        self, prompt: str, size: tuple[int, int, int], variant: Variant, seed: int
    ) -> tuple[Tensor, FlowField]:
        """Both stages: frames (N,3,H,W) of a prompt alone, for a size (N,H,W), and their flow."""
        frames, height, width = size
        result = self.pipeline(
            prompt,
            frames,
            height=height,
            width=width,
            flow_steps=self.sampling.flow_steps,
            flow_text_guidance_scale=self.sampling.flow_text_guidance,
            **self._arguments(variant, seed),
        )
        return result.frames, result.flow

    def _arguments(self, variant: Variant, seed: int) -> dict[str, Any]:
        return {
            "num_inference_steps": self.sampling.steps,
            "guidance_scale": self.sampling.guidance,
            "flow_guidance_scale": self.sampling.flow_guidance,
            "flow_start": self.sampling.flow_start,
            "seed": seed,
            "noise_sharing": variant.sharing,
            "noise_share": variant.share,
            "chunk_size": self.chunk,
        }


# ------------------------------------------------------------------------------------ modes

Make = Callable[["Generator", Any, "Variant", int], Made]


@dataclass(frozen=True)
class Mode:
    """`make` turns a clip of the data set and a seed into what is measured.

    sampled: it depends on noise, so that seeds mean something.
    shares: each of its frames has noise, so that noise sharing means something, too.
    stage_1: it needs a checkpoint with the flow generator.
    recipe: what else decides about its clips than checkpoint and sampling, such as weights of its
        own with their hash. Clips of another recipe are others; the protocol names it.
    """

    title: str
    make: Make
    sampled: bool = True
    shares: bool = True
    stage_1: bool = False
    recipe: str = ""


def _beside(clip: Any, frames: Tensor) -> Made:
    """Frames that are to move as a clip of the data set does."""
    still = getattr(clip, "still", None)
    return Made(frames, clip.flow, still_region(clip.flow) if still is None else still)


def _given_flow(generator: Generator, clip: Any, variant: Variant, seed: int) -> Made:
    return _beside(clip, generator.follow(clip.caption, clip.flow, variant, seed))


def _zero_flow(generator: Generator, clip: Any, variant: Variant, seed: int) -> Made:
    # Equal conditions and shared noise make equal frames: one is enough.
    count = 1 if variant.sharing == "shared" else clip.flow.frames
    flow = FlowField.zeros(count, clip.flow.height, clip.flow.width)
    frames = generator.follow(clip.caption, flow, variant, seed)
    return _beside(clip, frames.expand(clip.flow.frames, -1, -1, -1))


def _two_stage(generator: Generator, clip: Any, variant: Variant, seed: int) -> Made:
    size = (clip.flow.frames, clip.flow.height, clip.flow.width)
    frames, flow = generator.imagine(clip.caption, size, variant, seed)
    return Made(frames, flow, still_region(flow))


def _autoencoder(generator: Generator, clip: Any, variant: Variant, seed: int) -> Made:
    from ..training.vae import reconstruct

    frames = reconstruct(generator.pipeline.vae, pixels(clip.frames), generator.chunk)
    return _beside(clip, frames)


def _true(generator: Generator, clip: Any, variant: Variant, seed: int) -> Made:
    return _beside(clip, pixels(clip.frames))


MODES = {
    "given-flow": Mode("generated, given flow", _given_flow),
    "two-stage": Mode("generated, prompt alone", _two_stage, stage_1=True),
    "zero-flow": Mode("generated, zero flow", _zero_flow),
    "autoencoder": Mode("true clip through the autoencoder", _autoencoder, sampled=False),
    "true": Mode("true clip", _true, sampled=False),
}


@dataclass(frozen=True)
class Variant:
    """A mode with its noise sharing: one row of the results.

    Raises:
        ValueError: a mode that doesn't exist, or a noise sharing that doesn't or isn't used.
    """

    mode: str
    sharing: str = "shared"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Expected one of {', '.join(MODES)}, got {self.mode!r}.")
        check_sharing(self.sharing, self.share)
        if self.sharing != "shared" and not self._has_sharing:
            raise ValueError(f"{self.mode} has no noise to share: leave out {self.sharing!r}.")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read "MODE", "MODE:SHARING" or "MODE:mixed:SHARE", such as "given-flow:independent"."""
        mode, *rest = text.split(":")
        if len(rest) > 2 or (len(rest) == 2 and rest[0] != "mixed"):
            raise ValueError(f"Expected MODE, MODE:SHARING or MODE:mixed:SHARE, got {text!r}.")
        if len(rest) < 2:
            return cls(mode, *rest)
        try:
            share = float(rest[1])
        except ValueError:
            raise ValueError(f"Expected a share from 0 to 1, got {rest[1]!r}.") from None
        return cls(mode, rest[0], share)

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.sharing == "mixed":
            return f"{self.mode}:mixed:{self.share:g}"
        return self.mode if self.sharing == "shared" else f"{self.mode}:{self.sharing}"

    @property
    def sampled(self) -> bool:
        return MODES[self.mode].sampled

    @property
    def stage_1(self) -> bool:
        return MODES[self.mode].stage_1

    @property
    def recipe(self) -> str:
        return MODES[self.mode].recipe

    @property
    def _has_sharing(self) -> bool:
        return self.sampled and MODES[self.mode].shares

    @property
    def title(self) -> str:
        mode = MODES[self.mode]
        if not self._has_sharing:
            return mode.title
        share = f" ({self.share:g})" if self.sharing == "mixed" else ""
        return f"{mode.title}, {self.sharing} noise{share}"

    def make(self, generator: Generator, clip: Any, seed: int) -> Made:
        return MODES[self.mode].make(generator, clip, self, seed)
