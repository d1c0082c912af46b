"""Five levels each of blur, noise and shuffled frames, which any video distance must see."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = (0.5, 1.0, 2.0, 3.5, 6.0)  # standard deviation, of 128 pixels
NOISE = (0.01, 0.02, 0.04, 0.08, 0.16)  # standard deviation, of 1; more saturates
SHUFFLE = (1, 2, 3, 5, 8)  # of 8 pairs of frames two apart, how many change places


def blurred(clips: Tensor, sigma: float) -> Tensor:
    """Clips (B,N,3,H,W), Gaussian blur in space."""
    sigma = sigma * clips.shape[-1] / 128
    reach = max(round(3 * sigma), 1)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    frames = F.pad(clips.flatten(0, 1), [reach] * 4, mode="replicate")
    frames = F.conv2d(F.conv2d(frames, kernel[..., None], groups=3), kernel[:, :, None], groups=3)
    return frames.unflatten(0, clips.shape[:2])


def noisy(clips: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    return (clips + deviation * noise).clamp(0, 1)


def shuffled(clips: Tensor, pairs: int) -> Tensor:
    """Swap frames that stand two apart, the same ones and more at the next level.

    Swaps over all of the clip tell I3D no more after the first few: its temporal detail is coarse.
    """
    clips = clips.clone()
    for number, clip in enumerate(clips):
        firsts = [frame for frame in range(len(clip) - 2) if frame // 2 % 2 == 0]
        first = np.random.default_rng(number).permutation(firsts)[:pairs]
        clip[np.r_[first, first + 2]] = clip[np.r_[first + 2, first]]
    return clips


DEGRADATIONS = {
    "blur": (blurred, BLUR),
    "noise": (noisy, NOISE),
    "shuffle": (shuffled, SHUFFLE),
}
