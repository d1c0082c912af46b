"""What a call of a pipeline asks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..models import SamplingConfig
from ..sector import NoiseSharing

OUTPUT_TYPES = ("pt", "pil", "latent")
"""The forms that a clip comes in: a tensor, PIL images, latents."""


@dataclass(frozen=True, eq=False)
class Request:
    """What both pipelines take from their caller; every sampling of one call has the same.

    size: (height, width) in pixels. callback: takes the number of a step, which goes on from one
    sampling to the next, and the latents there; the others are as in `FlowToVideoPipeline`.

    Raises:
        ValueError: one of them is out of its range, or not what it should be.
    """

    prompt: str
    negative_prompt: str | None
    size: tuple[int, int]
    sampling: SamplingConfig
    seed: int
    noise_sharing: NoiseSharing
    chunk_size: int
    output_type: str
    callback: Callable[[int, Tensor], None] | None = None
    _steps: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"Expected one prompt as text, got {type(self.prompt).__name__}.")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {OUTPUT_TYPES}, not {self.output_type!r}."
            )
        if self.chunk_size < 1:
            raise ValueError(f"Expected chunk_size of at least 1, got {self.chunk_size}.")
        if not isinstance(self.noise_sharing, NoiseSharing):
            raise ValueError(
                f'Expected a NoiseSharing, such as NoiseSharing("shared"), got '
                f"{self.noise_sharing!r}."
            )

    def step_done(self, latents: Tensor) -> None:
        """Tell the caller, who may raise to stop."""
        if self.callback is not None:
            self.callback(next(self._steps), latents)
