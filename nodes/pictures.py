"""What comes in through IMAGE, MASK and VIDEO sockets, checked, and as the library wants it.

ComfyUI checks the type of a socket alone. What other packs send through it may be empty, of
another shape, or numbers that aren't finite after a VAE that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PICTURE = "an image (frames, height, width, channels) in colour or grey"
_MASK = "a mask (frames, height, width)"


def library_frames(images: torch.Tensor, name: str = "frames") -> torch.Tensor:
    """IMAGE (N,H,W,1, 3 or 4) as (N,3,H,W) in [0,1], alpha dropped, grey as colours.

    Raises:
        ValueError: it is no picture, by the input's name.
    """
    _check(images, name, _PICTURE, lambda shape: len(shape) == 4 and shape[-1] in (1, 3, 4))
    if not images.is_floating_point():
        raise ValueError(
            f"{name}: expected {_PICTURE} with values from 0 to 1, got {images.dtype}. Divide them "
            "by 255."
        )
    frames = images[..., :3].movedim(-1, 1).clamp(0, 1)
    return frames.expand(-1, 3, -1, -1) if frames.shape[1] == 1 else frames


def first_picture(images: torch.Tensor, name: str) -> torch.Tensor:
    """The first picture of an IMAGE as (1,3,H,W) in [0,1]; others aren't looked at."""
    several = isinstance(images, torch.Tensor) and images.ndim == 4
    return library_frames(images[:1] if several else images, name)


def video_components(video: Any, name: str = "video") -> Any:
    """What core reads of a VIDEO: at least one picture, sound, and the frame rate.

    Raises:
        ValueError: it is no video or can't be read, by the input's name.
    """
    from av.error import FFmpegError

    if not hasattr(video, "get_components"):
        raise ValueError(
            f"{name}: expected a video, got {type(video).__name__}. Connect Load Video or Create "
            "Video."
        )
    try:
        components = video.get_components()
    except (FFmpegError, OSError, ValueError, IndexError) as error:
        # Where there is sound alone, older versions ask for the first video of none.
        got = "no video stream" if isinstance(error, IndexError) else error
        raise ValueError(
            f"{name}: expected a video that can be read, got: {got}. Look whether the file plays "
            "elsewhere: a download may be cut short. If it plays, convert it to MP4 with H.264."
        ) from error
    if not len(components.images):
        raise ValueError(
            f"{name}: expected at least one frame, got none. Look whether the file plays elsewhere."
        )
    return components


def library_masks(masks: torch.Tensor | None, name: str = "mask") -> torch.Tensor:
    """MASK (h,w), (N,h,w) or (N,1,h,w) as (N,1,h,w) float32 in [0,1], on the CPU.

    Raises:
        ValueError: it is none, by the input's name.
    """
    if masks is None:
        raise ValueError(f"expected a {name}, got none. Connect one.")
    _check(
        masks,
        name,
        _MASK,
        lambda shape: len(shape) in (2, 3) or (len(shape) == 4 and shape[1] == 1),
    )
    return masks.reshape(-1, 1, *masks.shape[-2:]).float().cpu().clamp(0, 1)


def _check(
    given: torch.Tensor, name: str, expected: str, fits: Callable[[tuple[int, ...]], bool]
) -> None:
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{name}: expected {expected}, got {type(given).__name__}. Connect one.")
    shape = tuple(given.shape)
    if 0 in shape or not fits(shape):
        raise ValueError(
            f"{name}: expected {expected}, got {shape}. Look at what the node before this one "
            "gives."
        )
    if not given.isfinite().all():
        raise ValueError(
            f"{name}: expected {expected}, got numbers that aren't finite. The node before this "
            "one failed: look at its picture, and decode it with the VAE in float32."
        )
