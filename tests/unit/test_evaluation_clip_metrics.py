"""Metrics of one clip, on clips whose figures are known, and on puppets."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from s2dm.data.puppets import ACTIONS, PERSONS, render_clip
from s2dm.evaluation.clip_metrics import (
    Total,
    attribute_accuracy,
    flicker,
    flow_error,
    motion_magnitude,
    moving_region,
    nearest_word,
    pooled,
    srgb_to_lab,
    still_region,
    warp_error,
)
from s2dm.flow import FlowField


def moved_block(frames: int = 4, step: float = 2.0) -> FlowField:
    """A block of 8x8 pixels that goes right by `step` pixels a frame; one row of it is hidden."""
    displacement = torch.zeros(frames, 2, 32, 40)
    occlusion = torch.zeros(frames, 1, 32, 40)
    for i in range(1, frames):
        displacement[i, 0, 8:16, 20:28] = -step * i
        occlusion[i, 0, 15, 20:28] = 1
    return FlowField(displacement, occlusion)


def test_flow_error_is_the_share_of_the_motion_that_was_not_made():
    flow = moved_block()
    assert flow_error(flow, flow).figure == 0
    for factor, expected in ((0.0, 1.0), (0.5, 0.5), (2.0, 1.0), (-1.0, 2.0)):
        assert flow_error(flow.scale(factor), flow).figure == pytest.approx(expected)
    # What happens outside the moving region, or where frame 1 does not show the pixel, is left out.
    elsewhere = flow.displacement.clone()
    elsewhere[1:, :, :, :4] = 9
    elsewhere[1:, :, 15, 20:28] = 9
    assert flow_error(FlowField(elsewhere, flow.occlusion), flow).figure == 0


def test_moving_region_leaves_out_slow_and_hidden_pixels():
    region = moving_region(moved_block(step=0.9))
    assert region.shape == (4, 1, 32, 40)
    assert region.flatten(1).sum(1).tolist() == [0, 0, 7 * 8, 7 * 8]


def test_motion_is_a_length_in_pixels():
    flow = moved_block()
    assert motion_magnitude(flow, moving_region(flow)).figure == pytest.approx((2 + 4 + 6) / 3)
    share = 64 / (32 * 40)
    assert motion_magnitude(flow).figure == pytest.approx(share * (2 + 4 + 6) / 3)
    assert motion_magnitude(flow.scale(3)).figure == pytest.approx(share * (2 + 4 + 6))


def test_warp_error_is_the_difference_to_the_warped_first_frame():
    flow = moved_block()
    first = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0)) / 2
    frames = flow.warp(first)
    assert warp_error(frames, flow).figure == pytest.approx(0, abs=1e-4)
    brighter = frames.clone()
    brighter[1:] += 0.1
    assert warp_error(brighter, flow).figure == pytest.approx(25.5, abs=1e-3)
    hidden = frames.clone()
    hidden[1:, :, 15, 20:28] = 1
    assert warp_error(hidden, flow).figure == pytest.approx(0, abs=1e-4)


def test_flicker_is_the_deviation_over_time_of_still_pixels():
    still = torch.zeros(1, 1, 6, 5, dtype=torch.bool)
    still[..., :2, :] = True
    frames = torch.full((4, 3, 6, 5), 0.5)
    frames[:, :, 2:] = torch.rand(4, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert flicker(frames, still).figure == 0
    frames[::2, :, :2] += 0.1
    frames[1::2, :, :2] -= 0.1
    assert flicker(frames, still).figure == pytest.approx(25.5, abs=1e-4)
    assert flicker(frames, still[0, 0]) == flicker(frames, still)


def test_totals_are_pooled_by_weight():
    assert pooled([Total(1, 2), Total(9, 2)]).figure == 2.5
    assert pooled([Total(1, 1), Total(0, 99)]).figure == 0.01
    assert math.isnan(pooled([]).figure)
    still = FlowField.zeros(3, 8, 8)
    assert math.isnan(flow_error(still, still).figure)


# --------------------------------------------------------------------------------- attributes


@dataclass
class Region:
    mask: torch.Tensor
    colour: str
    palette: dict


PALETTE = {"red": (0.84, 0.16, 0.17), "blue": (0.16, 0.38, 0.82), "white": (0.95, 0.95, 0.94)}


def test_lab_of_known_colours():
    known = {  # sRGB under D65, to two digits
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.73, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
        (0.02, 0.02, 0.02): (1.40, 0, 0),
    }
    for rgb, expected in known.items():
        lab = srgb_to_lab(torch.tensor(rgb, dtype=torch.float32))
        assert np.allclose(lab, expected, atol=0.02), (rgb, lab)


def test_most_pixels_name_the_colour():
    pixels = torch.tensor([PALETTE["red"]] * 5 + [PALETTE["white"]] * 4)
    assert nearest_word(pixels, PALETTE) == "red"
    assert nearest_word(pixels * 0.7, PALETTE) == "red"  # in the shade
    assert nearest_word(pixels[3:], PALETTE) == "white"


def test_attribute_accuracy_counts_regions_that_are_in_sight():
    frame = torch.zeros(3, 4, 4)
    frame[:, :2] = torch.tensor(PALETTE["red"]).view(3, 1, 1)
    frame[:, 2:] = torch.tensor(PALETTE["blue"]).view(3, 1, 1)
    top, bottom, none = (torch.zeros(4, 4, dtype=torch.bool) for _ in range(3))
    top[:2], bottom[2:] = True, True
    regions = [Region(top, "red", PALETTE), Region(bottom, "white", PALETTE)]
    assert attribute_accuracy(frame, regions) == Total(1, 2)
    assert attribute_accuracy(frame, [*regions, Region(none, "red", PALETTE)]) == Total(1, 2)
    assert attribute_accuracy(frame.flip(1), regions) == Total(0, 2)


@pytest.fixture(scope="module")
def cast():
    """Every person, first in two actions each, then all in one."""
    various = [
        render_clip(person, (5 * person + offset) % len(ACTIONS), person, frames=1)
        for person in range(len(PERSONS))
        for offset in (0, 11)
    ]
    return various, [render_clip(person, 3, 0, frames=1) for person in range(len(PERSONS))]


def test_true_puppets_wear_what_their_captions_say(cast):
    various, _ = cast
    for clip in various:
        assert [garment.name for garment in clip.garments] == ["top", "trousers"]
        for garment in clip.garments:
            assert f"{garment.colour} " in clip.caption
            assert garment.mask.sum() > 60
            assert not (garment.mask & clip.still[0, 0]).any()
    totals = [attribute_accuracy(clip.frames[0], clip.garments) for clip in various]
    assert pooled(totals) == Total(96, 96)


def test_puppets_that_wear_other_colours_are_found_out(cast):
    """A clip of one person, looked at as if it were to show another, who stands a little apart."""
    _, clips = cast
    right = wrong = 0
    for clip in clips:
        for other in clips:
            for asked, worn in zip(clip.garments, other.garments, strict=True):
                agrees = attribute_accuracy(other.frames[0], [asked]).total == 1
                right += agrees == (asked.colour == worn.colour)
                wrong += agrees != (asked.colour == worn.colour)
    assert right / (right + wrong) > 0.97


def test_true_puppets_follow_their_flow_and_degraded_ones_do_not():
    clip = render_clip(3, 5, 0, size=64, frames=6)
    noise = torch.randn(clip.frames.shape, generator=torch.Generator().manual_seed(0))
    noisy = (clip.frames + 0.1 * noise).clamp(0, 1)
    assert warp_error(clip.frames, clip.flow).figure < 3
    assert warp_error(noisy, clip.flow).figure > 10
    assert flicker(clip.frames, clip.still).figure < 1e-3
    assert flicker(noisy, clip.still).figure > 10


def test_still_region_keeps_away_from_all_that_moves_or_is_hidden():
    flow = moved_block()
    still = still_region(flow, margin=3)[0, 0]
    assert not still[5:19, 17:31].any()  # rows 8 to 15, columns 20 to 27, and 3 pixels around
    assert still[:5].all() and still[19:].all() and still[:, :17].all() and still[:, 31:].all()
    assert still_region(FlowField.zeros(2, 9, 9)).all()
