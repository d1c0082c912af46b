"""Pictures in, as the first frame of a clip, and out, as PIL images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..models import whole_cells
from ..video import cover
from ..video.frames import from_uint8, to_uint8
from ..video.pictures import image_pixels

_ROUNDING = 1e-3


def picture_of(reference: Any, height: int, width: int) -> Tensor:
    """A user's reference frame as (1, 3, height, width); ValueError if it isn't one."""
    from PIL import Image

    if isinstance(reference, Image.Image):
        reference = from_uint8(image_pixels(reference))
    if not isinstance(reference, Tensor):
        raise ValueError(
            f"reference: expected a PIL image or a tensor, got {type(reference).__name__}."
        )
    if reference.ndim != 3 or reference.shape[0] != 3 or 0 in reference.shape:
        raise ValueError(
            f"reference: expected one RGB picture, (3, height, width), got "
            f"{tuple(reference.shape)}. Choose one frame, drop an alpha channel, repeat grey."
        )
    if not reference.is_floating_point() or not _in_unit_range(reference):
        raise ValueError(
            f"reference: expected numbers from 0 to 1, got {reference.dtype} from "
            f"{reference.min().item():g} to {reference.max().item():g}. Divide bytes by 255."
        )
    return cover(reference.detach().float().cpu()[None], height, width)


def _in_unit_range(picture: Tensor) -> bool:
    """False for NaN. Resizing goes past the range by rounding, which `cover` cuts off."""
    return bool(((picture > -_ROUNDING) & (picture < 1 + _ROUNDING)).all())


def on_canvas(picture: Tensor, cell: int) -> Tensor:
    """A picture (1, 3, H, W) in whole latent cells of so many pixels, its edge repeated."""
    height, width = picture.shape[-2:]
    margin = (0, whole_cells(width, cell) - width, 0, whole_cells(height, cell) - height)
    return F.pad(picture, margin, mode="replicate")


def to_pil(frames: Tensor) -> list[Any]:
    """Frames (N, 3, H, W) in [0, 1] as PIL images."""
    from PIL import Image

    return [Image.fromarray(to_uint8(frame)) for frame in frames]
