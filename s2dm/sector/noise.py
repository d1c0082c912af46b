"""Noise sharing: how much of its noise each frame of a clip has in common with the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NOISE_SHARING = ("shared", "independent", "mixed")

BrownianPath = Callable[[Any, Any], Tensor]
"""Takes σ and the σ to go to, as numbers or scalars; gives the noise of that interval."""


@dataclass(frozen=True)
class NoiseSharing:
    """How the frames of a clip share their noise, at the start and at every step.

    mode: "shared" gives every frame the same noise (the paper), "independent" each its own,
        "mixed" √share of the common and √(1−share) of an own noise, which keeps the variance
        at 1.
    share: the part of the variance that is common in "mixed", 0 to 1; unused otherwise.

    Raises:
        ValueError: an unknown mode, or a share outside [0, 1].
    """

    mode: str = "shared"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in NOISE_SHARING:
            raise ValueError(
                f"noise sharing: expected one of {', '.join(NOISE_SHARING)}, got {self.mode!r}."
            )
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share: expected a number from 0 to 1, got {self.share}.")

    def draw(
        self, num_frames: int, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw standard normal noise for the frames of one clip (ν_t of Eq. 7 and 8).

        Drawn on the CPU, so that a seed gives the same noise on every device.

        Args:
            num_frames: number of frames N, at least 1.
            shape: shape of one frame, usually (C, h, w).
            generator: a seeded CPU generator; torch's global one if None.

        Returns:
            (N, *shape), float32. In every mode but "mixed" the first frame is the noise of a clip
            of one frame with the same seed, so a reference frame and frame 1 of its clip agree.
            "shared" is an expanded view: clone before writing to it.

        Raises:
            ValueError: fewer than one frame.
        """
        if num_frames < 1:
            raise ValueError(f"expected at least 1 frame, got {num_frames}.")
        if self.mode == "independent":
            return _own(num_frames, shape, generator)
        common = torch.randn((1, *shape), generator=generator)
        if self.mode == "shared":
            return common.expand(num_frames, *shape)
        return self._mix(common, _own(num_frames, shape, generator))

    def brownian(
        self, path: Callable[[Tensor, int], BrownianPath], like: Tensor, seed: int
    ) -> BrownianPath:
        """The step noise of SDE samplers: increments of Brownian paths that are shared likewise.

        Their second-order steps ask for overlapping intervals, whose increments belong together,
        so plain draws would have the wrong distribution.

        Args:
            path: makes a Brownian path of a tensor's shape and device from a seed.
            like: the clip's latents, (N, ...).
            seed: of the common path; that of the frames' own paths comes after it.
        """
        if self.mode == "independent":
            return path(like, seed)
        common = path(like[:1], seed)
        if self.mode == "shared":
            # Contiguous: samplers may write to their noise.
            return lambda sigma, sigma_next: common(sigma, sigma_next).expand_as(like).contiguous()
        own = path(like, next_seed(seed))
        return lambda sigma, sigma_next: self._mix(
            common(sigma, sigma_next), own(sigma, sigma_next)
        )

    def _mix(self, common: Tensor, own: Tensor) -> Tensor:
        return math.sqrt(self.share) * common + math.sqrt(1.0 - self.share) * own


SHARED = NoiseSharing()
"""The paper's: one noise for all frames."""


def next_seed(seed: int) -> int:
    """The seed of further noise in a clip whose first noise was drawn with `seed`."""
    return (seed + 1) % 2**64


def seed_of_flow(seed: int) -> int:
    """The seed of stage 1 in a clip of some seed.

    With the clip's own, the noise of the flow would begin with the numbers of ν.
    """
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


def _own(num_frames: int, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Noise of each frame's own, (N, *shape), which begins with that of fewer frames."""
    # Frame by frame: torch fills a tensor in blocks, so one draw for all frames would not start
    # with the noise of one frame unless a frame fills whole blocks.
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(num_frames)])


class StepNoise(TorchFunctionMode):
    """While active, every normal draw over the frames of a clip follows the noise sharing.

    Stochastic schedulers draw fresh noise inside `step` for all frames at once, which would
    pull the rays of the sector apart at every step. Schedulers offer no common way to inject
    noise, but all of them draw it with `torch.randn` or `torch.randn_like`; this mode answers
    those calls, for tensors whose first dimension is the clip, and no others, and only inside
    its `with` block and thread.

    Args:
        num_frames: number of frames N of the clip.
        generator: seeded CPU generator that all step noise comes from.
        sharing: how the frames share it.
    """

    def __init__(
        self, num_frames: int, generator: torch.Generator | None, sharing: NoiseSharing = SHARED
    ) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.generator = generator
        self.sharing = sharing

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            shape, like = tuple(args[0].shape), args[0]
        elif func is torch.randn:
            size = kwargs.get("size", args)
            shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
            like = None
        else:
            return func(*args, **kwargs)
        if len(shape) < 2 or shape[0] != self.num_frames:
            return func(*args, **kwargs)
        # A mode is not active inside its own handler, so this draws from torch itself.
        noise = self.sharing.draw(shape[0], tuple(shape[1:]), self.generator)
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.float32)
        device = kwargs.get("device") or (like.device if like is not None else "cpu")
        # As torch's own, it may be written to.
        return noise.to(device=device, dtype=dtype).contiguous()
