"""Weights and frames that LFDM's RegionMM and ours can both rebuild, for the golden figures.

`tests/unit/data/lfdm_region_golden.npz` holds what LFDM's RegionPredictor, BGMotionPredictor and
Generator (commit 3601635) compute from them in evaluation mode: for each case what `seen` keeps
of their outputs, put into our order.
"""

import math

import torch
import torch.nn.functional as F
from lfdm_recipe import draw

from s2dm.models import RegionMotionConfig

CASES = {
    "published": RegionMotionConfig(),
    "small_with_border": RegionMotionConfig(
        size=(64, 96),
        regions=4,
        levels=3,
        width=8,
        flow_width=16,
        max_width=64,
        map_padding=3,
        frame_width=8,
        frame_blocks=2,
    ),
}
EVERY = {"positions": 16, "visible": 16, "features": 512, "picture": 256}


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight from its name at LFDM, so large that every layer matters."""
    values = draw(name, shape)
    if name.endswith("running_var"):
        return (1 + 0.2 * values).abs() + 0.2
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if name == "bg_predictor.fc.bias":
        return torch.tensor([1.0, 0, 0, 0, 1, 0]) + 0.1 * values
    if len(shape) == 1:
        return 0.2 * values
    sizes = {"regions.weight": 0.8, "bg_predictor.fc.weight": 0.05, "final.weight": 1.0}
    size = next((s for end, s in sizes.items() if name.endswith(end)), 1.4)
    return values * size / math.sqrt(math.prod(shape[1:]))


def frames(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two first frames and two others, (2, 3, H, W) in [0, 1]."""
    size = CASES[case].size
    coarse = draw(f"{case} frames", (4, 3, size[0] // 8, size[1] // 8))
    pictures = F.interpolate(2 * coarse, size=size, mode="bilinear").sigmoid()
    return pictures[:2], pictures[2:]


def seen(name: str, output: torch.Tensor) -> torch.Tensor:
    """The numbers of an output that the file keeps."""
    return output.flatten()[:: EVERY.get(name, 1)]
