"""Noise sharing: how much of its noise each frame of a clip has in common with the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NOISE_SHARING = ("shared", "independent", "mixed")


def check_sharing(sharing: str, share: float) -> None:
    """Raise ValueError unless `sharing` is one of `NOISE_SHARING` and `share` lies in [0, 1]."""
    if sharing not in NOISE_SHARING:
        raise ValueError(
            f"Noise sharing must be one of {', '.join(NOISE_SHARING)}, not {sharing!r}."
        )
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"The share of common noise must lie between 0 and 1, not {share}.")


def seed_of_flow(seed: int) -> int:
    """The seed of stage 1 in a clip of some seed.

    With the clip's own, the noise of the flow would begin with the numbers of ν.
    """
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


def draw_noise(
    frames: int,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    sharing: str = "shared",
    share: float = 0.5,
) -> Tensor:
    """Draw standard normal noise for the frames of one clip (ν_t of Eq. 7 and 8).

    Drawn on the CPU, so that a seed gives the same noise on every device.

    Args:
        frames: number of frames N, at least 1.
        shape: shape of one frame, usually (C, h, w).
        generator: a seeded CPU generator; torch's global one if None.
        sharing: "shared" gives every frame the same noise (the paper), "independent" each its
            own, "mixed" √share of the common and √(1−share) of an own noise, which keeps the
            variance at 1.
        share: the part of the variance that is common in "mixed", 0 to 1; unused otherwise.

    Returns:
        (N, *shape), float32. In every mode but "mixed" the first frame is the noise of a clip of
        one frame with the same seed, so a reference frame and frame 1 of its clip agree. "shared"
        is an expanded view: clone before writing to it.

    Raises:
        ValueError: fewer than one frame, an unknown mode, or a share outside [0, 1].
    """
    check_sharing(sharing, share)
    if frames < 1:
        raise ValueError(f"A clip needs at least 1 frame, not {frames}.")
    if sharing == "independent":
        return _own(frames, shape, generator)
    common = torch.randn((1, *shape), generator=generator)
    if sharing == "mixed":
        own = _own(frames, shape, generator)
        return math.sqrt(share) * common + math.sqrt(1.0 - share) * own
    return common.expand(frames, *shape)


def _own(frames: int, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Noise of each frame's own, (N, *shape), which begins with that of fewer frames."""
    # Frame by frame: torch fills a tensor in blocks, so one draw for all frames would not start
    # with the noise of one frame unless a frame fills whole blocks.
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(frames)])


class StepNoise(TorchFunctionMode):
    """While active, every normal draw over the frames of a clip follows the noise sharing.

    Stochastic schedulers draw fresh noise inside `step` for all frames at once, which would
    pull the rays of the sector apart at every step. Schedulers offer no common way to inject
    noise, but all of them draw it with `torch.randn` or `torch.randn_like`; this mode answers
    those calls, for tensors whose first dimension is the clip, and no others, and only inside
    its `with` block and thread.

    Args:
        frames: number of frames N of the clip.
        generator: seeded CPU generator that all step noise comes from.
        sharing, share: as in `draw_noise`.
    """

    def __init__(
        self,
        frames: int,
        generator: torch.Generator | None,
        sharing: str = "shared",
        share: float = 0.5,
    ) -> None:
        super().__init__()
        check_sharing(sharing, share)
        self.frames = frames
        self.generator = generator
        self.sharing = sharing
        self.share = share

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn_like:
            shape, like = tuple(args[0].shape), args[0]
        elif func is torch.randn:
            size = kwargs.get("size", args)
            shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
            like = None
        else:
            return func(*args, **kwargs)
        if len(shape) < 2 or shape[0] != self.frames:
            return func(*args, **kwargs)
        # A mode is not active inside its own handler, so this draws from torch itself.
        noise = draw_noise(shape[0], tuple(shape[1:]), self.generator, self.sharing, self.share)
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.float32)
        device = kwargs.get("device") or (like.device if like is not None else "cpu")
        # As torch's own, it may be written to.
        return noise.to(device=device, dtype=dtype).contiguous()
