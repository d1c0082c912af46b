"""Anchored rays: the anchor itself, noise levels, and what frame 1 tells the other frames."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowField
from s2dm.sector import (
    Anchor,
    NoiseLevels,
    ReferenceStates,
    alphas_cumprod,
    release,
    release_levels,
)


def cells(frames):
    """An encoder whose latents are the means of 8 x 8 pixels."""
    return torch.nn.functional.avg_pool2d(frames, 8)


def moving_flow(frames=3, size=32) -> FlowField:
    """The left half slides to the right, 4 pixels a frame; the right half stands still."""
    displacement = torch.zeros(frames, 2, size, size)
    displacement[:, 0, :, : size // 2] = -4.0 * torch.arange(frames).view(-1, 1, 1)
    return FlowField(displacement, torch.zeros(frames, 1, size, size))


def anchor(strength=1.0, **options) -> Anchor:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Anchor.of(picture, moving_flow(), cells, strength, **options)


def test_frame_1_and_what_stands_still_are_held_to_the_end():
    held = anchor()
    guess = torch.randn(3, 3, 4, 4)
    pulled = held.pull(guess, weight=0.0)
    assert torch.equal(pulled[0], held.latents[0])
    assert torch.equal(pulled[:, :, :, 3:], held.latents[:, :, :, 3:])
    # The left half moves; the cell beside it may need repair too.
    assert torch.equal(pulled[1:, :, :, :3], guess[1:, :, :, :3])


def test_while_noise_is_high_all_that_frame_1_shows_is_held():
    held = anchor()
    guess = torch.randn(3, 3, 4, 4)
    pulled = held.pull(guess, weight=1.0)
    expected = guess.lerp(held.latents, held.shown)
    torch.testing.assert_close(pulled, expected)
    # The strip that comes in from the left, 4 and 8 pixels wide: half a cell, a whole one.
    torch.testing.assert_close(held.shown[:, 0, 0, 0], torch.tensor([1.0, 0.5, 0.0]))
    assert torch.equal(pulled[2, :, :, 0], guess[2, :, :, 0])


def test_strength_0_changes_no_bit():
    guess = torch.randn(3, 3, 4, 4)
    assert torch.equal(anchor(strength=0.0).pull(guess, weight=1.0), guess)


def test_a_long_clip_is_anchored_a_few_frames_at_a_time():
    seen = []

    def encode(frames):
        seen.append(len(frames))
        return cells(frames)

    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = Anchor.of(picture, moving_flow(), encode, chunk_size=2)
    assert seen == [2, 1]
    assert torch.equal(parts.latents, anchor().latents)


def test_one_frame_has_its_part_of_the_anchor():
    held, guess = anchor(strength=0.7), torch.randn(3, 3, 4, 4)
    for weight in (0.0, 0.5, 1.0):
        pulled = held.of_frame(1).pull(guess[1:2], weight)
        torch.testing.assert_close(pulled, held.pull(guess, weight)[1:2])


@given(sigma=st.floats(0, 20))
@settings(max_examples=50, deadline=None)
def test_the_anchor_lets_go_evenly(sigma):
    weight = release(sigma, begin=1.5, end=0.5)
    assert weight == pytest.approx(min(max(sigma - 0.5, 0.0), 1.0))


@pytest.mark.parametrize("end", [0.01, 0.3, 0.95, 1.0])
def test_an_anchor_acts_before_its_end_and_not_after_it(end):
    levels = NoiseLevels(alphas_cumprod())
    released = release_levels(end, levels.sigma)
    assert release(levels.sigma(end * 0.9), *released) == 1
    assert 0 < release(levels.sigma(end * 0.98), *released) < 1
    assert release(levels.sigma(end), *released) == 0


def test_noise_levels_are_those_of_the_schedule():
    alphas = alphas_cumprod()
    levels = NoiseLevels(alphas)
    for step in (0, 1, 500, 999):
        expected = ((1 - alphas[step]) / alphas[step]).sqrt().item()
        assert levels.sigma_at(step) == pytest.approx(expected, rel=1e-5)
    between = levels.sigma_at(500.5)
    assert between == pytest.approx(math.sqrt(levels.sigma_at(500) * levels.sigma_at(501)))
    assert levels.sigma(0) == math.inf and levels.sigma(1) == 0
    assert levels.sigma(0.5) == pytest.approx(levels.sigma_at(499.5))


def test_every_frame_sees_frame_1_of_its_own_condition():
    states = ReferenceStates()
    batch = torch.arange(6.0).view(6, 1, 1)  # two conditions with three frames each
    beside = states.beside("layer", batch, groups=2, first=True)
    assert beside.flatten().tolist() == [0, 0, 0, 3, 3, 3]
    later = states.beside("layer", batch[:4] + 100, groups=2, first=False)
    assert later.flatten().tolist() == [0, 0, 3, 3]


def test_frames_before_frame_1_are_refused():
    with pytest.raises(RuntimeError, match="from frame 1 on"):
        ReferenceStates().beside("layer", torch.zeros(2, 1, 1), groups=1, first=False)
