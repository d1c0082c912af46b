"""The flow generator of stage 1: a sequence of optical flows from prompt and reference frame.

Section 3.4 of the paper (arXiv 2403.13408) generates flow with a 3D U-Net, as LFDM does
(arXiv 2303.13744). The network here is LFDM's: convolutions act within a frame, frames meet
in temporal attention. `FlowGeneratorConfig()` has the published sizes, and `lfdm.py` the
names of LFDM's weights. Ours beside it: normalisation frame by frame, learned null labels,
patches, and the strength of the motion as a condition, after HiGen (arXiv 2312.04483).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention3d import LinearAttention, RelativePositionBias, SpatialAttention, TemporalAttention
from .config.stage1 import FlowGeneratorConfig

FLOW_CHANNELS = 3  # displacement x and y, occlusion
MOTION_SCALE = 1000.0  # half-frames to the range of time steps, which the sinusoids are made for


class UNet3D(nn.Module):
    """The 3D U-Net from its first convolution to the features that the heads read.

    Args:
        channels: of what the first convolution reads.
        conditions: width of the vector that stands beside the embedding of time.
        config: the sizes, under the names of `FlowGeneratorConfig`: `model_channels`,
            `widths`, `num_heads`, `head_dim`, `norm`, `norm_groups`, `upsample`.
    """

    def __init__(self, channels: int, conditions: int, config: FlowGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width, widths = config.model_channels, config.widths
        time = 4 * width
        embedding = time + conditions

        self.position_bias = RelativePositionBias(config.num_heads)
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.GELU(), nn.Linear(time, time))
        self.first = nn.Conv2d(channels, width, 7, padding=3)
        self.first_attention = TemporalAttention(width, config.num_heads, config.head_dim)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = width
        for level, after in enumerate(widths):
            down = Level(before, after, embedding, config)
            up = Level(2 * after, before, embedding, config)
            if level != len(widths) - 1:
                down.resample = nn.Conv2d(after, after, 4, stride=2, padding=1)
            if level != 0:
                up.resample = _upsample(before, config.upsample)
            self.down.append(down)
            self.up.insert(0, up)
            before = after
        self.middle = Middle(before, embedding, config)

    def features(self, first: Tensor, embedding: Tensor) -> Tensor:
        """Through all levels.

        Args:
            first: what the first convolution made, (B, N, model_channels, h, w).
            embedding: time and conditions as one vector, (B, 4 model_channels + conditions).

        Returns:
            (B, N, 2 model_channels, h, w).
        """
        bias = self.position_bias(first.shape[1])
        x = self.first_attention(first, bias)
        skips = []
        for level in cast(Iterable[Level], self.down):
            x = level(x, embedding, bias)
            skips.append(x)
            x = x if level.resample is None else per_frame(level.resample, x)
        x = self.middle(x, embedding, bias)
        for level in cast(Iterable[Level], self.up):
            x = level(torch.cat([x, skips.pop()], dim=2), embedding, bias)
            x = x if level.resample is None else per_frame(level.resample, x)
        return torch.cat([x, first], dim=2)

    def embed_time(self, timesteps: Tensor, batch: int) -> Tensor:
        """Time steps (B,), or one for all clips, to (B, 4 model_channels)."""
        weight = next(self.time_embed.parameters())
        timesteps = timesteps.to(weight.device).reshape(-1).expand(batch)
        return self.time_embed(sinusoids(timesteps, weight.shape[1]).to(weight))


class FlowGenerator(UNet3D):
    """Predicts the noise (or velocity) in a clip of flow conditions, all frames at once.

    Each of the conditions reference, text and motion may be `None`, or not kept for some
    clips of the batch: its null label then stands for it, as classifier-free guidance needs.
    """

    def __init__(self, config: FlowGeneratorConfig) -> None:
        cells = config.patch**2
        channels = FLOW_CHANNELS * cells + config.reference_channels
        super().__init__(channels, config.text_dim, config)
        width, time = config.model_channels, 4 * config.model_channels
        self.flow_head = Head(2 * width, width, 2 * cells, config)
        self.occlusion_head = Head(2 * width, width, cells, config)

        self.null_reference: nn.Parameter | None = None
        self.null_text: nn.Parameter | None = None
        self.null_motion: nn.Parameter | None = None
        self.motion_embed: nn.Sequential | None = None
        if config.null_reference == "learned":
            self.null_reference = nn.Parameter(torch.zeros(1, config.reference_channels, 1, 1))
        if config.null_text == "learned":
            self.null_text = nn.Parameter(torch.zeros(1, config.text_dim))
        if config.motion_strength:
            first, last = nn.Linear(width, time), nn.Linear(time, time)
            # Zero at the start, so that a network trained without it can be given this input.
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.motion_embed = nn.Sequential(first, nn.SiLU(), last)
            self.null_motion = nn.Parameter(torch.zeros(1, time))

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        reference: Tensor | None = None,
        text: Tensor | None = None,
        motion: Tensor | None = None,
        *,
        keep_reference: Tensor | None = None,
        keep_text: Tensor | None = None,
        keep_motion: Tensor | None = None,
    ) -> Tensor:
        """Predict noise (or velocity), whichever the network was trained on.

        All of the type of the weights, apart from time steps, motion and the masks.

        Args:
            sample: noised clips (B, N, 3, h, w): flow conditions as `FlowField.condition`
                makes them, on the scale that training gave them. Any N from 1; h and w are
                multiples of `config.factor`.
            timesteps: (B,), or one for all clips.
            reference: features of the reference frame (B, reference_channels, h, w), not
                noised. Resized to (h, w) / patch if of another size.
            text: one embedding for each prompt, (B, text_dim).
            motion: mean length of the displacement over a whole clip in half-frames, (B,).
            keep_reference, keep_text, keep_motion: (B,) of true and false; false puts the
                null label in place of that clip's condition.

        Returns:
            (B, N, 3, h, w). Nothing forces frame 1 to zero flow here: that is a statement
            about clean clips, for whoever samples.

        Raises:
            ValueError: if a shape does not fit, or motion is given to a network without it.
        """
        self._check(sample, reference, text, motion)
        sample = per_frame(lambda frame: F.pixel_unshuffle(frame, self.config.patch), sample)
        batch, _, _, *size = sample.shape
        reference = _or_null(reference, self.null_reference, keep_reference)
        if reference is None:
            reference = sample.new_zeros(1, self.config.reference_channels, 1, 1)
        reference = _resized(reference, size)
        embedding = self._embed(timesteps, text, motion, keep_text, keep_motion, batch)
        x = self.features(self._first(sample, reference), embedding)
        return torch.cat([self._cells(self.flow_head(x)), self._cells(self.occlusion_head(x))], 2)

    def _cells(self, x: Tensor) -> Tensor:
        return per_frame(lambda frame: F.pixel_shuffle(frame, self.config.patch), x)

    def _first(self, sample: Tensor, reference: Tensor) -> Tensor:
        # One convolution over both, but what is the same in all frames is computed once.
        weight, bias = self.first.weight, self.first.bias
        noisy, steady = weight.split((sample.shape[2], reference.shape[1]), dim=1)
        x = per_frame(lambda frame: F.conv2d(frame, noisy, bias, padding=3), sample)
        return x + F.conv2d(reference, steady, padding=3)[:, None]

    def _embed(
        self,
        timesteps: Tensor,
        text: Tensor | None,
        motion: Tensor | None,
        keep_text: Tensor | None,
        keep_motion: Tensor | None,
        batch: int,
    ) -> Tensor:
        """Time, motion and text as one vector for each clip, (B, 4 model_channels + text_dim)."""
        time = self.embed_time(timesteps, batch)
        if self.motion_embed is not None:
            if motion is not None:
                weight = next(self.motion_embed.parameters())
                scaled = sinusoids(motion.to(weight.device) * MOTION_SCALE, weight.shape[1])
                motion = self.motion_embed(scaled.to(weight))
            null = cast(Tensor, self.null_motion)
            time = time + cast(Tensor, _or_null(motion, null, keep_motion))
        text = _or_null(text, self.null_text, keep_text)
        if text is None:
            text = time.new_zeros(1, self.config.text_dim)
        return torch.cat([time, text.expand(batch, -1)], dim=1)

    def _check(
        self, sample: Tensor, reference: Tensor | None, text: Tensor | None, motion: Tensor | None
    ) -> None:
        config = self.config
        if sample.ndim != 5 or sample.shape[2] != FLOW_CHANNELS or 0 in sample.shape:
            _refuse("sample", "(batch, frames, 3, height, width)", sample, "Noise flow conditions.")
        batch, _, _, height, width = sample.shape
        if height % config.factor or width % config.factor:
            expected = f"height and width that are multiples of {config.factor}"
            _refuse("sample", expected, sample, "Make the condition of another size.")
        channels = config.reference_channels
        if reference is not None and (
            reference.ndim != 4 or reference.shape[:2] != (batch, channels) or 0 in reference.shape
        ):
            expected = f"({batch}, {channels}, height, width)"
            _refuse("reference", expected, reference, "Encode it as for training.")
        if text is not None and text.shape != (batch, config.text_dim):
            expected = f"({batch}, {config.text_dim})"
            _refuse("text", expected, text, "Give one embedding for each clip.")
        if motion is not None and self.motion_embed is None:
            raise ValueError(
                "motion: expected None, got a tensor. This flow generator was made without "
                "motion strength."
            )
        if motion is not None and motion.shape != (batch,):
            _refuse("motion", f"({batch},)", motion, "Give one number for each clip.")


class Level(nn.Module):
    """One level of the U-Net on one side: two residual blocks, linear and temporal attention."""

    def __init__(
        self, before: int, after: int, embedding: int, config: FlowGeneratorConfig
    ) -> None:
        super().__init__()
        heads, head_dim = config.num_heads, config.head_dim
        self.block1 = ResidualBlock(before, after, config, embedding)
        self.block2 = ResidualBlock(after, after, config, embedding)
        self.spatial = LinearAttention(after, heads, head_dim)
        self.temporal = TemporalAttention(after, heads, head_dim)
        self.resample: nn.Module | None = None

    def forward(self, x: Tensor, embedding: Tensor, bias: Tensor) -> Tensor:
        x = self.block2(self.block1(x, embedding), embedding)
        return self.temporal(self.spatial(x), bias)


class Middle(nn.Module):
    """The coarsest level: full spatial and temporal attention between two residual blocks."""

    def __init__(self, width: int, embedding: int, config: FlowGeneratorConfig) -> None:
        super().__init__()
        heads, head_dim = config.num_heads, config.head_dim
        self.block1 = ResidualBlock(width, width, config, embedding)
        self.spatial = SpatialAttention(width, heads, head_dim)
        self.temporal = TemporalAttention(width, heads, head_dim)
        self.block2 = ResidualBlock(width, width, config, embedding)

    def forward(self, x: Tensor, embedding: Tensor, bias: Tensor) -> Tensor:
        x = self.temporal(self.spatial(self.block1(x, embedding)), bias)
        return self.block2(x, embedding)


class Head(nn.Module):
    """Features to the channels of one prediction."""

    def __init__(self, before: int, width: int, after: int, config: FlowGeneratorConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(before, width, config)
        self.conv = nn.Conv2d(width, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.conv, self.block(x))


class ResidualBlock(nn.Module):
    """Two convolutions within each frame; the embedding scales and shifts the first's result."""

    def __init__(
        self, before: int, after: int, config: FlowGeneratorConfig, embedding: int | None = None
    ) -> None:
        super().__init__()
        self.whole_clip = config.norm == "clip"
        self.modulate = None if embedding is None else nn.Linear(embedding, 2 * after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm1 = nn.GroupNorm(config.norm_groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, after)
        self.skip = None if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        y = self._normalise(self.norm1, per_frame(self.conv1, x))
        if self.modulate is not None and embedding is not None:
            scale, shift = self.modulate(F.silu(embedding))[:, None, :, None, None].chunk(2, dim=2)
            y = y * (scale + 1) + shift
        y = self._normalise(self.norm2, per_frame(self.conv2, F.silu(y)))
        return F.silu(y) + (x if self.skip is None else per_frame(self.skip, x))

    def _normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if self.whole_clip:
            return norm(x.transpose(1, 2)).transpose(1, 2)
        return per_frame(norm, x)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer of images to each frame of (B, N, C, h, w)."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of (B,) values at `width` / 2 frequencies from 1 to 1/10000."""
    half = width // 2
    steps = torch.arange(half, device=values.device, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(steps * (-math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _upsample(width: int, kind: str) -> nn.Module:
    if kind == "transposed":
        return nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
    )


def _or_null(value: Tensor | None, null: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """The value where it is kept, the null label (`None`: zeros) elsewhere."""
    if value is None or keep is None:
        return null if value is None else value
    keep = keep.to(value.device).view(-1, *[1] * (value.ndim - 1))
    return torch.where(keep, value, 0 if null is None else null)


def _resized(image: Tensor, size: list[int]) -> Tensor:
    if list(image.shape[2:]) == size:
        return image
    if image.shape[2:] == (1, 1):
        return image.expand(-1, -1, *size)
    # CPUs have no antialiasing in half precision, and Apple's GPUs have had none for long.
    source = image.float().to("cpu" if image.device.type == "mps" else image.device)
    return F.interpolate(source, size=size, mode="bilinear", antialias=True).to(image)


def _refuse(name: str, expected: str, got: Tensor, remedy: str) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {tuple(got.shape)}. {remedy}")
