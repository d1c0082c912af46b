"""Stable Diffusion 1.5 in its full size, with random weights, and a photo to move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2dm.video import cover, read_image


def photo(height: int = 128, width: int = 128) -> Tensor:
    """(3,H,W) in [0,1]: the portrait that comes with matplotlib, a work of the US government."""
    from matplotlib import cbook

    path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return cover(read_image(path)[None], height, width)[0]


def fill_at_random(module: nn.Module) -> nn.Module:
    """Weights that keep the size of what passes through; norms as they start, no biases."""
    # One draw for all, repeated: drawing 860 million numbers takes a minute.
    draw = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
                continue
            repeats = -(-parameter.numel() // len(draw))
            values = draw.repeat(repeats)[: parameter.numel()].view(parameter.shape)
            parameter.copy_(values * (parameter[0].numel() ** -0.5))
        for part in module.modules():
            if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
                part.weight.fill_(1)
    return module.eval()


def autoencoder() -> nn.Module:
    """Of Stable Diffusion 1.5, in diffusers' class."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    return fill_at_random(vae.to_empty(device="cpu"))
