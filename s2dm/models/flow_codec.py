"""Flow as the flow generator sees it, and back.

Stage 1 diffuses clips of three channels: the displacement in units of the config's
`displacement_scale`, and the occlusion brought to [-1, 1]. Frame 1 never moves.

LFDM diffuses the positions that its RegionMM gives (`region_motion.py`) and what is *visible*,
brought to [-1, 1]: there, "no motion" is a grid of positions, and nothing says that frame 1 has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flow import FlowField
from .config.stage1 import FlowGeneratorConfig
from .region_motion import grid


def encode_flow(condition: Tensor, config: FlowGeneratorConfig) -> Tensor:
    """Flow conditions (..., 3, h, w) of `FlowField.condition` as clean samples, same shape."""
    displacement, occlusion = condition.split((2, 1), dim=-3)
    if config.flow == "positions":
        still = grid(condition.shape[-2:], condition)
        return torch.cat([displacement + still, 1 - occlusion * 2], dim=-3)
    return torch.cat([displacement / config.displacement_scale, occlusion * 2 - 1], dim=-3)


def decode_flow(
    sample: Tensor,
    config: FlowGeneratorConfig,
    height: int,
    width: int,
    still: Tensor | None = None,
) -> FlowField:
    """A clean sample (N, 3, h, w) as a flow field of `height` x `width` pixels.

    Occlusion is clamped to [0, 1], and frame 1 is set to zero.

    Args:
        sample: of the flow generator.
        config: of the flow generator.
        height, width: of the field.
        still: (2, h, w), for a generator of positions those that mean "no motion", see
            `RegionMotion.still`; each cell's own if None.

    Raises:
        FlowError: if the sample has another shape.
    """
    displacement, occlusion = sample.float().split((2, 1), dim=-3)
    if config.flow == "positions":
        still = grid(sample.shape[-2:], displacement) if still is None else still
        condition = torch.cat([displacement - still, (1 - occlusion) / 2], dim=-3)
    else:
        moved = displacement * config.displacement_scale
        condition = torch.cat([moved, (occlusion + 1) / 2], dim=-3)
    return FlowField.from_condition(condition, height, width)


def constrain(x0: Tensor, config: FlowGeneratorConfig) -> Tensor:
    """What a guess (B, N, 3, h, w) of the clean sample becomes during sampling.

    Dynamic thresholding as in LFDM (arXiv 2303.13744): values beyond the percentile
    `config.threshold` of the whole clip, but at least 1, are cut, and the clip is divided by
    it. Then frame 1 is set to "no motion, all visible", which it is by definition; not so where
    the clip holds positions.
    """
    if config.threshold > 0:
        flat = x0.flatten(1).abs().float()
        limit = torch.quantile(flat, config.threshold, dim=1).clamp_min(1.0)
        limit = limit.to(x0).view(-1, 1, 1, 1, 1)
        x0 = x0.clamp(-limit, limit) / limit
    if config.flow == "positions":
        return x0
    still = encode_flow(torch.zeros_like(x0[:, :1]), config)
    return torch.cat([still, x0[:, 1:]], dim=1)


def mean_motion(condition: Tensor) -> Tensor:
    """Mean length of the displacement over a clip, in half-frames: (..., N, 3, h, w) -> (...)."""
    # Tensor.norm over such a dimension is many times slower on a CPU.
    length = condition[..., :2, :, :].float().square().sum(dim=-3).sqrt()
    return length.mean(dim=(-3, -2, -1))
