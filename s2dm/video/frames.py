"""A frame as everything here sees it: a float tensor in memory, bytes in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_FPS = 8.0


class VideoError(ValueError):
    """A clip can't be read or written; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Moment:
    """A frame of a clip that is being read.

    Attributes:
        time: when it is shown, in seconds; None where nothing says so.
        pixels: gives it as (H, W, 3) uint8, until the next one is read. A reader that wants
            only some frames calls it for those alone.
    """

    time: float | None
    pixels: Callable[[], np.ndarray]


def from_uint8(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255)


def to_uint8(frame: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to a contiguous (H, W, 3) uint8 array, rounded to the nearest."""
    scaled = frame.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())


def cover(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale frames (N, C, H, W) to cover height x width, then crop them at the centre."""
    factor = max(height / frames.shape[-2], width / frames.shape[-1])
    if factor != 1:
        scaled = (
            max(height, round(frames.shape[-2] * factor)),
            max(width, round(frames.shape[-1] * factor)),
        )
        frames = F.interpolate(frames, scaled, mode="bilinear", antialias=True)
    top = (frames.shape[-2] - height) // 2
    left = (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width].clamp(0, 1)


def spread(total: int, count: int) -> list[int]:
    """Numbers of `count` frames spread evenly over `total`, the first and the last among them."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def size_text(frame: Tensor) -> str:
    """A frame's size as people write it, width first."""
    return f"{frame.shape[-1]}x{frame.shape[-2]}"
