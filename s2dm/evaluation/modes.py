"""What can be evaluated: each mode makes a clip, or takes the true one, to be measured.

A new way to generate is one more entry in `MODES`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..flow import FlowField, pose_flow
from ..models import FlowSampling, SamplingConfig
from ..sector import SHARED, NoiseSharing
from .clip_metrics import still_region

if TYPE_CHECKING:
    from ..pipelines import FlowToVideoPipeline


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


class ClipSampler:
    """A checkpoint that generates clips. It is loaded when it is first needed.

    Args:
        checkpoint: a `.safetensors` file.
        sampling, flow_sampling: how, in stage 2 and in stage 1.
        chunk_size: frames computed at a time.
        device: to compute on.
        dtype: of the weights.
    """

    def __init__(
        self,
        checkpoint: Path,
        sampling: SamplingConfig,
        flow_sampling: FlowSampling = FlowSampling(),  # noqa: B008 (frozen)
        chunk_size: int = 8,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint, self.chunk_size = checkpoint, chunk_size
        self.sampling, self.flow_sampling = sampling, flow_sampling
        self.device, self.dtype = device, dtype

    @cached_property
    def pipeline(self) -> FlowToVideoPipeline:
        """Of both stages where the checkpoint has them."""
        from ..pipelines import open_pipeline

        pipeline = open_pipeline(self.checkpoint, self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def plain(self) -> ClipSampler:
        """The paper's plain method: no frame is anchored, and none sees frame 1."""
        _ = self.pipeline  # loaded before the copy, so that both have the same one
        other = copy(self)
        other.sampling = replace(self.sampling, anchor_end=0.0, reference_attention=False)
        return other

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
            flow_sampling=self.flow_sampling,
            **self._arguments(variant, seed),
        )
        return result.frames, result.flow

    def _arguments(self, variant: Variant, seed: int) -> dict[str, Any]:
        return {
            "sampling": self.sampling,
            "seed": seed,
            "noise_sharing": variant.sharing,
            "chunk_size": self.chunk_size,
        }


# ------------------------------------------------------------------------------------ modes

Make = Callable[["ClipSampler", Any, "Variant", int], Made]


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
    still = still_region(clip.flow) if clip.still is None else clip.still
    return Made(frames, clip.flow, still)


def _given_flow(sampler: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    return _beside(clip, sampler.follow(clip.caption, clip.flow, variant, seed))


def _given_pose(sampler: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    if clip.pose is None:
        raise ValueError(
            f"{variant} needs clips whose keypoints are known, such as the puppets: leave it out, "
            "or take another data set."
        )
    flow = pose_flow(clip.pose, clip.flow.height, clip.flow.width)
    return _beside(clip, sampler.follow(clip.caption, flow, variant, seed))


def _plain(make: Make) -> Make:
    """The mode without what we added to the paper's sampling."""
    return lambda sampler, clip, variant, seed: make(sampler.plain(), clip, variant, seed)


def _zero_flow(sampler: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    # Equal conditions and shared noise make equal frames: one is enough.
    count = 1 if variant.sharing.mode == "shared" else clip.flow.num_frames
    flow = FlowField.zeros(count, clip.flow.height, clip.flow.width)
    frames = sampler.follow(clip.caption, flow, variant, seed)
    return _beside(clip, frames.expand(clip.flow.num_frames, -1, -1, -1))


def _two_stage(sampler: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    size = (clip.flow.num_frames, clip.flow.height, clip.flow.width)
    frames, flow = sampler.imagine(clip.caption, size, variant, seed)
    return Made(frames, flow, still_region(flow))


def _autoencoder(sampler: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    from ..pipelines.modules import reconstruct

    frames = reconstruct(sampler.pipeline.vae, clip.pixels, sampler.chunk_size)
    return _beside(clip, frames)


def _true(sampler: ClipSampler, clip: Any, variant: Variant, seed: int) -> Made:
    return _beside(clip, clip.pixels)


MODES = {
    "given-flow": Mode("generated, given flow", _given_flow),
    "two-stage": Mode("generated, prompt alone", _two_stage, stage_1=True),
    "given-pose": Mode("generated, given pose", _given_pose),
    "given-flow-plain": Mode("plain, given flow", _plain(_given_flow)),
    "two-stage-plain": Mode("plain, prompt alone", _plain(_two_stage), stage_1=True),
    "given-pose-plain": Mode("plain, given pose", _plain(_given_pose)),
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
    sharing: NoiseSharing = SHARED

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Expected one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.sharing.mode != "shared" and not self._has_sharing:
            raise ValueError(f"{self.mode} has no noise to share: leave out {self.sharing.mode!r}.")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read "MODE", "MODE:SHARING" or "MODE:mixed:SHARE", such as "given-flow:independent"."""
        mode, *rest = text.split(":")
        if len(rest) > 2 or (len(rest) == 2 and rest[0] != "mixed"):
            raise ValueError(f"Expected MODE, MODE:SHARING or MODE:mixed:SHARE, got {text!r}.")
        if len(rest) < 2:
            return cls(mode, NoiseSharing(*rest))
        try:
            share = float(rest[1])
        except ValueError:
            raise ValueError(f"Expected a share from 0 to 1, got {rest[1]!r}.") from None
        return cls(mode, NoiseSharing("mixed", share))

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.sharing.mode == "mixed":
            return f"{self.mode}:mixed:{self.sharing.share:g}"
        return self.mode if self.sharing.mode == "shared" else f"{self.mode}:{self.sharing.mode}"

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
        share = f" ({self.sharing.share:g})" if self.sharing.mode == "mixed" else ""
        return f"{mode.title}, {self.sharing.mode} noise{share}"

    def make(self, sampler: ClipSampler, clip: Any, seed: int) -> Made:
        return MODES[self.mode].make(sampler, clip, self, seed)


TRUE = Variant("true")
"""What FVD compares with."""
