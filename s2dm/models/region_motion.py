"""Region motion: the flow between two frames, from regions that move as wholes.

After Siarohin et al., "Motion Representations for Articulated Animation" (arXiv 2104.11280), in
the form in which LFDM (arXiv 2303.13744) makes its flow with it, there called RegionMM. Regions
are heatmaps that nobody labelled; each has a centre and, from the spread of its heatmap, an
affine frame. Two frames then give one affine motion for each region and one for the background,
and a network says for every cell which of them it follows, and whether frame 1 shows it.

`RegionMotionConfig()` has the published sizes, `lfdm_region.py` the names of the published
weights. Positions are (x, y) from -1 at the left and top cell to 1 at the right and bottom one;
sampling at them counts -1 and 1 as the outer edges of these cells instead, as the published
weights were trained. `estimate_pair` takes out what comes of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow.geometry import resample
from .config.stage1 import RegionMotionConfig

_LEAST_SPREAD = 1e-7  # added to the variances, so that a heatmap of one cell has an inverse


class Regions(NamedTuple):
    """Where the regions of B frames are.

    centre: (B, K, 2), positions (x, y).
    covariance: (B, K, 2, 2) of the heatmap around it.
    affine: (B, K, 2, 2), the axes of the region: a square root of the covariance.
    """

    centre: Tensor
    covariance: Tensor
    affine: Tensor

    def part(self, rows: slice) -> Regions:
        """The regions of some of the frames."""
        return Regions(*(value[rows] for value in self))


class PairMotion(NamedTuple):
    """How B frames moved since B first frames, (h, w) cells.

    positions: (B, 2, h, w), where in the first frame each cell comes from.
    visible: (B, 1, h, w) in [0, 1], 1 where the first frame shows it.
    """

    positions: Tensor
    visible: Tensor


class RegionMotion(nn.Module):
    """All of the model: regions, background, flow, and a frame's features there and back."""

    def __init__(self, config: RegionMotionConfig) -> None:
        super().__init__()
        self.config = config
        self.regions = RegionPredictor(config)
        self.background = BackgroundPredictor(config)
        self.flow = FlowPredictor(config)
        self.encoder = FrameEncoder(config)
        self.decoder = FrameDecoder(config)

    def forward(self, first: Tensor, frame: Tensor) -> PairMotion:
        """Motion from `frame` back to `first`, both (B, 3, H, W) in [0, 1] of the config's size."""
        self._check(first)
        self._check(frame)
        found = self.regions(torch.cat([first, frame]))
        count = len(first)
        return self.motion(first, frame, found.part(slice(count)), found.part(slice(count, None)))

    def motion(self, first: Tensor, frame: Tensor, before: Regions, after: Regions) -> PairMotion:
        """As `forward`, with the regions of `first` and of `frame` known."""
        return self.flow(first, before, after, self.background(first, frame))

    def features(self, first: Tensor) -> Tensor:
        """What LFDM's flow generator sees of a frame: (B, 3, H, W) to (B, C, h, w)."""
        first = resample(first, *self.config.size)
        return self.encoder(first)[-1]

    def reconstruct(self, first: Tensor, motion: PairMotion) -> Tensor:
        """The frame that this motion makes of `first`, (B, 3, H, W) in [0, 1]."""
        return self.decoder(first, self.encoder(first), motion)

    @torch.no_grad()
    def still(self, first: Tensor) -> Tensor:
        """Positions (B, 2, h, w) that the model gives where nothing has moved."""
        first = resample(first, *self.config.size)
        return self(first, first).positions

    @torch.no_grad()
    def estimate_pair(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Displacement (2, H, W) in pixels and occlusion (1, H, W) of one frame since the first.

        first, frame: (3, H, W) in [0, 1], any size; the model sees them at its own. What it
        says of a frame that hasn't moved is "no motion", whatever positions these are.
        """
        height, width = first.shape[1:]
        parameter = next(self.parameters())
        pair = resample(torch.stack([first, frame]), *self.config.size).to(parameter)
        found = self(pair[:1].expand(2, -1, -1, -1), pair)
        still, moved = found.positions.float().cpu()
        half_frame = still.new_tensor([width / 2, height / 2]).view(1, 2, 1, 1)
        displacement = resample((moved - still)[None], height, width) * half_frame
        occlusion = resample(1 - found.visible[1:].float().cpu(), height, width)
        return displacement[0], occlusion[0].clamp(0, 1)

    def _check(self, frame: Tensor) -> None:
        if frame.ndim != 4 or tuple(frame.shape[1:]) != (3, *self.config.size):
            raise ValueError(
                f"frames: expected (batch, 3, {self.config.size[0]}, {self.config.size[1]}), got "
                f"{tuple(frame.shape)}. Resize them."
            )


class RegionPredictor(nn.Module):
    """Frames to regions: an hourglass, a map for each region, and the spread of its softmax."""

    def __init__(self, config: RegionMotionConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.shrink = Shrink(config.shrink)
        self.hourglass = Hourglass(3, config.width, config)
        padding = config.map_padding
        self.maps = nn.Conv2d(self.hourglass.channels, config.regions, 7, padding=padding)

    def forward(self, frames: Tensor) -> Regions:
        """(B, 3, H, W) to the regions of each."""
        maps = self.maps(self.hourglass(self.shrink(frames))).float()
        heat = (maps.flatten(2) / self.temperature).softmax(dim=2)  # (B, K, cells)
        with torch.autocast(heat.device.type, enabled=False):
            cells = grid(maps.shape[2:], heat).flatten(1).T  # (cells, 2)
            centre = heat @ cells
            offsets = cells - centre[:, :, None]  # (B, K, cells, 2)
            covariance = (offsets * heat[..., None]).transpose(2, 3) @ offsets
            return Regions(centre, covariance, axes(covariance))


class BackgroundPredictor(nn.Module):
    """Two frames to the affine motion of what stands behind, as 3x3 matrices."""

    def __init__(self, config: RegionMotionConfig) -> None:
        super().__init__()
        widths = halving_widths(6, config.width, config.max_width, config.levels)
        self.down = nn.ModuleList(
            Block(before, after, "down") for before, after in pairwise(widths)
        )
        self.affine = nn.Linear(widths[-1], 6)
        nn.init.zeros_(self.affine.weight)
        with torch.no_grad():
            self.affine.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, first: Tensor, frame: Tensor) -> Tensor:
        """(B, 3, H, W) each to (B, 3, 3): positions in `frame` to positions in `first`."""
        x = torch.cat([first, frame], dim=1)
        for block in self.down:
            x = block(x)
        rows = self.affine(x.mean(dim=(2, 3))).float().view(-1, 2, 3)
        last = rows.new_tensor([0.0, 0, 1]).expand(len(rows), 1, 3)
        return torch.cat([rows, last], dim=1)


class FlowPredictor(nn.Module):
    """Motions of regions and background to one position and one visibility for each cell."""

    def __init__(self, config: RegionMotionConfig) -> None:
        super().__init__()
        motions = config.regions + 1
        self.shrink = Shrink(config.shrink)
        # Of each motion: how the region's heat changed, and the first frame moved by it.
        self.hourglass = Hourglass(4 * motions, config.flow_width, config)
        self.weights = nn.Conv2d(self.hourglass.channels, motions, 7, padding=3)
        self.visible = nn.Conv2d(self.hourglass.channels, 1, 7, padding=3)

    def forward(
        self, first: Tensor, before: Regions, after: Regions, background: Tensor
    ) -> PairMotion:
        """Regions of the first frame and of the other one, and (B, 3, 3), to the motion."""
        small = self.shrink(first)
        with torch.autocast(small.device.type, enabled=False):
            cells = grid(small.shape[2:], before.centre)
            positions = self._candidates(cells, before, after, background)  # (B, K+1, h, w, 2)
            heat = gaussian(cells, after) - gaussian(cells, before)  # (B, K, h, w)
        heat = F.pad(heat, (0, 0, 0, 0, 1, 0))  # none for the background, which comes first
        motions = positions.shape[1]
        pictures = small[:, None].expand(-1, motions, -1, -1, -1).flatten(0, 1)
        moved = sample(pictures, positions.flatten(0, 1).to(small)).unflatten(0, (-1, motions))
        seen = torch.cat([heat[:, :, None].to(moved), moved], dim=2).flatten(1, 2)
        x = self.hourglass(seen)
        weights = self.weights(x).float().softmax(dim=1)[..., None]
        joined = (positions * weights).sum(dim=1).movedim(-1, 1)
        return PairMotion(joined, self.visible(x).float().sigmoid())

    def _candidates(
        self, cells: Tensor, before: Regions, after: Regions, background: Tensor
    ) -> Tensor:
        """Where each cell comes from if it follows the background, or one of the regions."""
        turned = before.affine @ torch.linalg.inv(after.affine)
        # The axes of a region are known up to their sign.
        turned = turned * turned[..., :1, :1].sign()
        offsets = cells.movedim(0, -1) - after.centre[:, :, None, None]  # (B, K, h, w, 2)
        moved = torch.einsum("bkij,bkhwj->bkhwi", turned, offsets) + before.centre[:, :, None, None]
        plane = torch.einsum("bij,jhw->bhwi", background[:, :2, :2], cells)
        plane = plane + background[:, None, None, :2, 2]
        return torch.cat([plane[:, None], moved], dim=1)


class FrameEncoder(nn.Module):
    """A frame to its features at every size from the full one down."""

    def __init__(self, config: RegionMotionConfig) -> None:
        super().__init__()
        widths = _frame_widths(config)
        self.first = Block(3, widths[0], size=7)
        self.down = nn.ModuleList(
            Block(before, after, "down") for before, after in pairwise(widths)
        )

    def forward(self, frame: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to features, the largest first."""
        found = [self.first(frame)]
        for block in self.down:
            found.append(block(found[-1]))
        return found


class FrameDecoder(nn.Module):
    """Features moved by the flow to a picture; what the first frame hides is made up."""

    def __init__(self, config: RegionMotionConfig) -> None:
        super().__init__()
        widths = _frame_widths(config)[::-1]
        self.blocks = nn.ModuleList(Residual(widths[0]) for _ in range(config.frame_blocks))
        self.up = nn.ModuleList(Block(before, after, "up") for before, after in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], 3, 7, padding=3)

    def forward(self, first: Tensor, features: list[Tensor], motion: PairMotion) -> Tensor:
        """First frame (B, 3, H, W), its features, and the motion to (B, 3, H, W)."""
        moved, visible = _moved(features[-1], motion)
        x = moved * visible
        for block in self.blocks:
            x = block(x)
        for block, kept in zip(self.up, features[:0:-1], strict=True):
            x = block(_mended(x, kept, motion))
        x = _mended(x, features[0], motion)
        return _mended(self.last(x).sigmoid(), first, motion)


class Hourglass(nn.Module):
    """Down and up again, every step's input joined to what comes back at its size."""

    def __init__(self, before: int, width: int, config: RegionMotionConfig) -> None:
        super().__init__()
        most, levels = config.max_width, config.levels
        down = halving_widths(before, width, most, levels)
        up = [min(most, width * 2**level) for level in reversed(range(levels))]
        self.down = nn.ModuleList(Block(inner, outer, "down") for inner, outer in pairwise(down))
        joined = [down[-1], *(made + skip for made, skip in zip(up, down[-2:0:-1], strict=False))]
        self.up = nn.ModuleList(
            Block(inner, outer, "up") for inner, outer in zip(joined, up, strict=True)
        )
        self.channels = up[-1] + before

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x)
        for block in self.up:
            x = torch.cat([block(x), skips.pop()], dim=1)
        return x


class Block(nn.Module):
    """Convolution, normalisation, ReLU; enlarged ahead of it ("up") or halved after it."""

    def __init__(self, before: int, after: int, resize: str = "", size: int = 3) -> None:
        super().__init__()
        self.resize = resize
        self.conv = nn.Conv2d(before, after, size, padding=size // 2)
        self.norm = BatchNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.relu(self.norm(self.conv(x)))
        return F.avg_pool2d(x, 2) if self.resize == "down" else x


class Residual(nn.Module):
    """Two convolutions, each after normalisation and ReLU, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(width), BatchNorm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class BatchNorm(nn.Module):
    """Normalisation over a batch; all that it keeps is numbers that a checkpoint can store."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-5
        )


class Shrink(nn.Module):
    """A picture at 1/`factor` of its size, smoothed by a Gaussian first; black beyond its edge."""

    kernel: Tensor

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        sigma = (factor - 1) / 2
        reach = round(4 * sigma)
        bell = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(-reach, reach + 1)]
        square = [[row * column / sum(bell) ** 2 for column in bell] for row in bell]
        self.register_buffer("kernel", torch.tensor(square), persistent=False)

    def forward(self, picture: Tensor) -> Tensor:
        kernel = self.kernel.to(picture).expand(3, 1, -1, -1)
        reach = self.kernel.shape[-1] // 2
        return F.conv2d(picture, kernel, stride=self.factor, padding=reach, groups=3)


def grid(size: Sequence[int], like: Tensor) -> Tensor:
    """(2, h, w): position (x, y) of every cell, -1 to 1 from the first to the last."""
    height, width = size
    y = torch.linspace(-1, 1, height, dtype=like.dtype, device=like.device)
    x = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows])


def axes(covariance: Tensor) -> Tensor:
    """U √S of covariances U S Uᵀ, (..., 2, 2) each: the axes of an ellipse as columns.

    On the CPU, whatever the device: the signs are LAPACK's, as those of the published weights,
    and other libraries choose others.
    """
    spread = covariance + _LEAST_SPREAD * torch.eye(2).to(covariance)
    directions, sizes, _ = torch.linalg.svd(spread.cpu())
    return (directions * sizes.sqrt()[..., None, :]).to(covariance.device)


def gaussian(cells: Tensor, regions: Regions) -> Tensor:
    """Bells of height 1 with the regions' centres and covariances at cells (2, h, w): (B,K,h,w)."""
    spread = regions.covariance + _LEAST_SPREAD * torch.eye(2).to(regions.covariance)
    offsets = cells.movedim(0, -1) - regions.centre[:, :, None, None]
    turned = torch.einsum("bkhwi,bkij->bkhwj", offsets, torch.linalg.inv(spread))
    return torch.exp(-0.5 * (turned * offsets).sum(dim=-1))


def sample(picture: Tensor, positions: Tensor) -> Tensor:
    """(B, C, H, W) at positions (B, h, w, 2), whose -1 and 1 are the picture's edges; black
    beyond them."""
    return F.grid_sample(picture, positions, align_corners=False)


def halving_widths(before: int, width: int, most: int, levels: int) -> list[int]:
    """Channels ahead of and after each of `levels` halvings."""
    return [before, *(min(most, width * 2 ** (level + 1)) for level in range(levels))]


def _frame_widths(config: RegionMotionConfig) -> list[int]:
    """Channels of a frame's features at each size, the full one first."""
    return [config.frame_width * 2**level for level in range(config.frame_levels + 1)]


def _moved(features: Tensor, motion: PairMotion) -> tuple[Tensor, Tensor]:
    """Features as the flow moves them, and which of them the first frame shows."""
    size = list(features.shape[2:])
    positions, visible = motion
    if list(positions.shape[2:]) != size:
        positions, visible = (
            F.interpolate(value, size=size, mode="bilinear", align_corners=False)
            for value in motion
        )
    moved = sample(features, positions.movedim(1, -1).to(features))
    return moved, visible.to(features)


def _mended(x: Tensor, kept: Tensor, motion: PairMotion) -> Tensor:
    """Moved features where the first frame shows them, x elsewhere."""
    moved, visible = _moved(kept, motion)
    return moved * visible + x * (1 - visible)
