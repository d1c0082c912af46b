"""LFDM's names for the weights of a region-motion model, its `RegionMM_*.pth`.

The published file is a dictionary of the dictionaries `region_predictor`, `bg_predictor` and
`generator`, beside the optimiser and how far training had come. What follows from the settings
is in there too (the kernels that smooth, the counters of batch normalisation) and no weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config.stage1 import RegionMotionConfig
from .lfdm import Key, check_weights
from .region_motion import RegionMotion

NETWORKS = ("region_predictor", "bg_predictor", "generator")

# How the modules are called here, and there below the name of the network.
_NAMES = (
    ("regions.hourglass.down.", "region_predictor.predictor.encoder.down_blocks."),
    ("regions.hourglass.up.", "region_predictor.predictor.decoder.up_blocks."),
    ("regions.maps.", "region_predictor.regions."),
    ("background.down.", "bg_predictor.encoder.down_blocks."),
    ("background.affine.", "bg_predictor.fc."),
    ("flow.hourglass.down.", "generator.pixelwise_flow_predictor.hourglass.encoder.down_blocks."),
    ("flow.hourglass.up.", "generator.pixelwise_flow_predictor.hourglass.decoder.up_blocks."),
    ("flow.weights.", "generator.pixelwise_flow_predictor.mask."),
    ("flow.visible.", "generator.pixelwise_flow_predictor.occlusion."),
    ("encoder.first.", "generator.first."),
    ("encoder.down.", "generator.down_blocks."),
    ("decoder.blocks.", "generator.bottleneck.r"),
    ("decoder.up.", "generator.up_blocks."),
    ("decoder.last.", "generator.final."),
)
_NO_WEIGHT = re.compile(r"(.*\.num_batches_tracked|.*(predictor)\.down\.weight)")

# All that the files of the three data sets differ in is the border of the regions' maps, which
# no weight shows: MUG was trained with one of 3 cells, for 46,500 steps of 100 pairs.
_PAIRS_OF_MUG = 4_650_000


def is_region_motion(content: Any) -> bool:
    """Whether this is what LFDM pickles of its RegionMM."""
    return isinstance(content, dict) and all(
        isinstance(content.get(name), Mapping) for name in NETWORKS
    )


def region_motion_config(content: Mapping[str, Any]) -> RegionMotionConfig:
    """The config of such a file, by the shapes of its weights.

    What they don't show is as LFDM published it: the temperature, and frames as small as the
    network takes (128x128).

    Raises:
        ValueError: a weight that shows a size is missing.
    """
    regions, generator = content["region_predictor"], content["generator"]
    down = [
        w
        for name, w in regions.items()
        if re.fullmatch(r"predictor\.encoder\.down_blocks\.\d+\.conv\.weight", name)
    ]
    frame = [
        w for name, w in generator.items() if re.fullmatch(r"down_blocks\.\d+\.conv\.weight", name)
    ]
    flow = "pixelwise_flow_predictor.hourglass.encoder.down_blocks.0.conv.weight"
    try:
        known = {
            "regions": regions["regions.weight"].shape[0],
            "levels": len(down),
            "width": down[0].shape[0] // 2,
            "flow_width": generator[flow].shape[0] // 2,
            "max_width": max(w.shape[0] for w in down),
            "frame_levels": len(frame),
            "frame_width": frame[0].shape[1],
        }
    except (LookupError, AttributeError) as error:
        raise ValueError(f"expected the weights of its hourglasses, got none ({error}).") from error
    example = content.get("example")
    mug = isinstance(example, int) and example == _PAIRS_OF_MUG
    blocks = {name.split(".")[1] for name in generator if name.startswith("bottleneck.")}
    side = 2 ** (known["levels"] + known["frame_levels"])
    return RegionMotionConfig(
        size=(side, side),
        frame_blocks=len(blocks),
        map_padding=3 if mug else 0,
        **known,
    )


def lfdm_region_keys(config: RegionMotionConfig) -> tuple[Key, ...]:
    """Return the weights, LFDM's names with that of the network before them."""
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in RegionMotion(config).state_dict().items()}
    return tuple(Key(name, _lfdm_name(name), shape, shape) for name, shape in shapes.items())


def from_lfdm_region(content: Mapping[str, Any], config: RegionMotionConfig) -> dict[str, Tensor]:
    """Turn LFDM's three dictionaries into the weights of a `RegionMotion`.

    Raises:
        ValueError: a weight is missing, unexpected or of another shape.
    """
    keys = lfdm_region_keys(config)
    there = {f"{part}.{name}": w for part in NETWORKS for name, w in content[part].items()}
    weights = {name: w for name, w in there.items() if not _NO_WEIGHT.fullmatch(name)}
    check_weights(weights, {key.lfdm: key.lfdm_shape for key in keys})
    return {key.ours: weights[key.lfdm] for key in keys}


def _lfdm_name(ours: str) -> str:
    for here, there in _NAMES:
        if ours.startswith(here):
            return there + ours.removeprefix(here)
    raise AssertionError(f"no name for {ours}")
