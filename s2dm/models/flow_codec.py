"""Flow as the flow generator sees it, and back.

Stage 1 diffuses clips of three channels: the displacement in units of the config's
`displacement_scale`, and the occlusion brought to [-1, 1]. Frame 1 never moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flow import FlowField
from .config import FlowGeneratorConfig


def encode_flow(condition: Tensor, config: FlowGeneratorConfig) -> Tensor:
    """Flow conditions (..., 3, h, w) of `FlowField.condition` as clean samples, same shape."""
    displacement, occlusion = condition.split((2, 1), dim=-3)
    return torch.cat([displacement / config.displacement_scale, occlusion * 2 - 1], dim=-3)


def decode_flow(sample: Tensor, config: FlowGeneratorConfig, height: int, width: int) -> FlowField:
    """A clean sample (N, 3, h, w) as a flow field of `height` x `width` pixels.

    Occlusion is clamped to [0, 1], and frame 1 is set to zero.

    Raises:
        FlowError: if the sample has another shape.
    """
    displacement, occlusion = sample.float().split((2, 1), dim=-3)
    condition = torch.cat([displacement * config.displacement_scale, (occlusion + 1) / 2], dim=-3)
    return FlowField.from_condition(condition, height, width)


def constrain(x0: Tensor, config: FlowGeneratorConfig) -> Tensor:
    """What a guess (B, N, 3, h, w) of the clean sample becomes during sampling.

    Dynamic thresholding as in LFDM (arXiv 2303.13744): values beyond the percentile
    `config.threshold` of the whole clip, but at least 1, are cut, and the clip is divided by
    it. Then frame 1 is set to "no motion, all visible", which it is by definition.
    """
    if config.threshold > 0:
        flat = x0.flatten(1).abs().float()
        limit = torch.quantile(flat, config.threshold, dim=1).clamp_min(1.0)
        limit = limit.to(x0).view(-1, 1, 1, 1, 1)
        x0 = x0.clamp(-limit, limit) / limit
    still = encode_flow(torch.zeros_like(x0[:, :1]), config)
    return torch.cat([still, x0[:, 1:]], dim=1)


def mean_motion(condition: Tensor) -> Tensor:
    """Mean length of the displacement over a clip, in half-frames: (..., N, 3, h, w) -> (...)."""
    # Tensor.norm over such a dimension is many times slower on a CPU.
    length = condition[..., :2, :, :].float().square().sum(dim=-3).sqrt()
    return length.mean(dim=(-3, -2, -1))
