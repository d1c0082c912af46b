"""Faster training on a CPU.

PyTorch's GroupNorm is slow there for tensors in channels-last order, which the convolutions want:
in a small autoencoder its gradient takes more than half of each step. The layer here computes the
same in a few passes over memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    """Group normalisation of (N, pixels, C), statistics in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        count = x.shape[1] * (x.shape[2] // groups)
        total = _by_group(_sum(x), groups).sum(-1, keepdim=True)
        squares = _by_group(_sum(x * x), groups).sum(-1, keepdim=True)
        mean = total / count
        rstd = (squares / count - mean.square()).clamp_min(0).add(eps).rsqrt()
        scale = rstd * weight.float().view(groups, -1)
        shift = bias.float().view(groups, -1) - mean * scale
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return torch.addcmul(_row(shift, x), x, _row(scale, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        groups = ctx.groups
        count = x.shape[1] * (x.shape[2] // groups)
        gain = weight.float().view(groups, -1)
        by_bias = _by_group(_sum(grad), groups)
        by_x = _by_group(_sum(grad * x), groups)
        grad_bias = by_bias.sum(0).flatten()
        grad_weight = ((by_x - mean * by_bias) * rstd).sum(0).flatten()
        first = (by_bias * gain).sum(-1, keepdim=True)
        second = (by_x * gain).sum(-1, keepdim=True)
        slope = -rstd.pow(3) * (second - mean * first) / count
        offset = -slope * mean - rstd * first / count
        grad_x = torch.addcmul(
            _row(offset.expand_as(by_x), x), x, _row(slope.expand_as(by_x), x)
        ).addcmul_(grad, _row(rstd * gain, x))
        return grad_x, grad_weight.to(weight), grad_bias.to(weight), None, None


def _by_group(values: Tensor, groups: int) -> Tensor:
    return values.view(len(values), groups, -1)


def _sum(x: Tensor) -> Tensor:
    """Sum of (N, pixels, C) over the pixels in float32, without a float32 copy of the whole.

    Short sums are rounded to the input's type, and their rounding errors average out.
    """
    pixels = x.shape[1]
    run = next(size for size in (16, 8, 4, 2, 1) if pixels % size == 0)
    return x.unflatten(1, (pixels // run, run)).sum(2).sum(1, dtype=torch.float32)


def _row(values: Tensor, like: Tensor) -> Tensor:
    """(N, groups, C/groups) to (N, 1, C) in the type of `like`."""
    return values.reshape(len(values), 1, -1).to(like.dtype)


def _group_norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type != "cpu" or not channels_last or x.dtype != torch.bfloat16:
        return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    height, width = x.shape[2:]
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    out = _GroupNorm.apply(rows, layer.weight, layer.bias, layer.num_groups, layer.eps)
    return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class FastGroupNorm(nn.GroupNorm):
    """GroupNorm that is fast for bfloat16 in channels-last order on a CPU, plain elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return _group_norm(self, x)


def speed_up(model: nn.Module) -> None:
    """Give the model's GroupNorm layers their fast form; keys and weights stay."""
    for module in model.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = FastGroupNorm


@contextlib.contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, run attention as matrix products in the type of its inputs; elsewhere as it is."""
    if device.type != "cpu":
        yield
        return
    cuda = torch.backends.cuda  # where PyTorch keeps this switch, for every device
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)
