"""Pictures made by code where any picture with detail will do."""

import torch
import torch.nn.functional as F
from torch import Tensor

_CONTRAST = 0.15  # standard deviation of the colours at each scale


def clouds(count: int, size: int) -> Tensor:
    """Clouds of colour, (N,3,size,size) in [0,1], the same ones in each call.

    As much contrast at each scale, from half the picture down to a pixel, as photographs have
    about.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.full((count, 3, size, size), 0.5)
    side = 2
    while side <= size:
        colours = torch.randn(count, 3, side, side, generator=generator)
        pictures += _CONTRAST * F.interpolate(colours, size=size, mode="bilinear")
        side *= 2
    return pictures.clamp(0, 1)
