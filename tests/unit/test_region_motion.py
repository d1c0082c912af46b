"""The region-motion model: what LFDM's RegionMM computes, and what its flow must be."""

import dataclasses
from pathlib import Path

import lfdm_region_recipe as recipe
import numpy as np
import pytest
import torch
from lfdm_files import region_motion_content

from s2dm.models import RegionMotionConfig
from s2dm.models.lfdm_region import (
    NETWORKS,
    from_lfdm_region,
    is_region_motion,
    lfdm_region_keys,
    region_motion_config,
)
from s2dm.models.region_motion import RegionMotion, axes
from s2dm.settings import SettingsError

HERE = Path(__file__).parent
GOLDEN = HERE / "data" / "lfdm_region_golden.npz"
SMALL = recipe.CASES["small_with_border"]


def model(config: RegionMotionConfig = SMALL) -> RegionMotion:
    net = RegionMotion(config)
    net.load_state_dict(from_lfdm_region(region_motion_content(config), config))
    return net.eval()


@pytest.mark.parametrize(
    "case", [pytest.param("published", marks=pytest.mark.slow), "small_with_border"]
)
def test_it_computes_what_lfdm_computes(case):
    config = recipe.CASES[case]
    net = model(config)
    first, frame = recipe.frames(case)
    with torch.no_grad():
        found = net.regions(torch.cat([first, frame]))
        background = net.background(first, frame)
        motion = net(first, frame)
        outputs = {
            **found._asdict(),
            "background": background,
            **motion._asdict(),
            "features": net.features(first),
            "picture": net.reconstruct(first, motion),
        }
    golden = np.load(GOLDEN)
    for name, output in outputs.items():
        expected = torch.from_numpy(golden[f"{case} {name}"])
        got = recipe.seen(name, output)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4, msg=lambda m, n=name: n + m)


def test_equal_frames_have_no_motion_and_a_pair_has_the_size_of_its_pictures():
    net = model()
    first, frame = (
        torch.rand(3, 50, 41, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    displacement, occlusion = net.estimate_pair(first, first)
    assert displacement.shape == (2, 50, 41) and occlusion.shape == (1, 50, 41)
    assert displacement.abs().max() < 1e-3
    displacement, occlusion = net.estimate_pair(first, frame)
    assert displacement.abs().max() > 0.1
    assert 0 <= occlusion.min() and occlusion.max() <= 1
    assert occlusion.std() > 0.01


def test_the_axes_of_a_region_square_to_its_covariance():
    square = torch.randn(5, 3, 2, 2)
    covariance = square @ square.mT
    found = axes(covariance)
    torch.testing.assert_close(found @ found.mT, covariance, rtol=0, atol=1e-5)
    assert torch.isfinite(axes(torch.zeros(1, 2, 2))).all()


def test_a_file_of_lfdm_shows_its_sizes():
    square = dataclasses.replace(SMALL, size=(32, 32))
    assert is_region_motion(region_motion_content(square))
    assert not is_region_motion({"generator": {}})
    assert region_motion_config(region_motion_content(square, example=4_650_000)) == square
    content: dict = {part: {} for part in NETWORKS}
    for key in lfdm_region_keys(RegionMotionConfig()):
        part, name = key.lfdm.split(".", 1)
        content[part][name] = torch.empty(key.shape, device="meta")
    assert region_motion_config(content | {"example": 4_310_000}) == RegionMotionConfig()
    with pytest.raises(ValueError, match="hourglass"):
        region_motion_config({part: {} for part in NETWORKS})


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_wrong_weights_are_refused(change):
    content = region_motion_content(SMALL)
    weights = content["generator"]
    name = "up_blocks.0.conv.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "another.weight"
        weights[name] = torch.zeros(1)
    else:
        weights[name] = weights[name][:1]
    with pytest.raises(ValueError, match=f"{change}.*{name}|{name}.*{change}"):
        from_lfdm_region(content, SMALL)


@pytest.mark.parametrize(
    "change",
    [{"size": (100, 128)}, {"regions": 0}, {"map_padding": 4}, {"temperature": 0}],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(SettingsError, match=next(iter(change))):
        dataclasses.replace(RegionMotionConfig(), **change)
