"""Flow the other way, from another frame, and chained from frame to frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField
from s2dm.flow.inverse import from_previous, rebase, reverse, to_previous

quick = settings(max_examples=20, deadline=None)


def moving_square(frames: int = 5, size: int = 48, step: int = 4):
    """A square on a smooth ground that goes right, and its exact flow."""
    x = torch.arange(size, dtype=torch.float32)
    ground = (0.3 + 0.2 * torch.sin(x / 5)).expand(1, size, size)
    images = ground.repeat(frames, 1, 1, 1)
    field = FlowField.zeros(frames, size, size)
    for index in range(frames):
        left = 10 + step * index
        images[index, :, 20:30, left : left + 10] = torch.linspace(0.7, 1, 10)
        if index:
            field.occlusion[index, 0, 20:30, 10:20] = 1
            field.occlusion[index, 0, 20:30, left : left + 10] = 0
            field.displacement[index, 0, 20:30, left : left + 10] = -step * index
    return images, field


def pan(frames: int, height: int, width: int, x: float, y: float) -> FlowField:
    time = torch.linspace(0, 1, frames).view(-1, 1, 1, 1)
    move = torch.tensor([x, y]).view(1, 2, 1, 1) * time
    move = move.expand(-1, -1, height, width).contiguous()
    return FlowField(move, torch.zeros(frames, 1, height, width))


def test_reversed_exact_flow_reproduces_the_reversed_clip():
    images, field = moving_square()
    backwards = reverse(field)
    error = (backwards.warp(images[-1:]) - images.flip(0)).abs() * (1 - backwards.occlusion)
    assert error.max() < 1e-4
    # Uncovered, seen from the last frame: where the square stood there, and nothing else.
    expected = torch.zeros(48, 48)
    expected[20:30, 26:36] = 1
    expected[20:30, 10:20] = 0
    torch.testing.assert_close(backwards.occlusion[-1, 0], expected)
    # The background that frame 1 hides is seen by frames 2 to 5, so it is not occluded.
    assert not backwards.occlusion[1, 0, 20:30, 10:14].any()
    again = reverse(backwards)
    torch.testing.assert_close(again.displacement, field.displacement)
    torch.testing.assert_close(again.occlusion, field.occlusion)


@quick
@given(st.integers(2, 6), st.floats(-3, 3), st.floats(-3, 3))
def test_a_reversed_pan_is_a_pan_the_other_way(frames, x, y):
    backwards = reverse(pan(frames, 24, 32, x, y))
    expected = pan(frames, 24, 32, -x, -y).displacement
    torch.testing.assert_close(backwards.displacement, expected, atol=1e-3, rtol=0)


def test_a_reversed_zoom_is_the_inverse_zoom():
    """Twice as large: splatting alone would leave holes here."""
    size, zoom = 33, 2.0
    y, x = torch.meshgrid(torch.arange(size) - 16.0, torch.arange(size) - 16.0, indexing="ij")
    points = torch.stack([x, y])
    displacement = torch.stack([torch.zeros_like(points), points * (zoom - 1)])
    backwards = reverse(FlowField(displacement, torch.zeros(2, 1, size, size)))
    torch.testing.assert_close(backwards.displacement[1], points / zoom - points, atol=1e-3, rtol=0)
    assert not backwards.occlusion.any()


def test_frames_from_the_middle_on():
    images, field = moving_square()
    tail = rebase(field, [2, 3, 4])
    error = (tail.warp(images[2:3]) - images[2:]).abs() * (1 - tail.occlusion)
    assert error.max() < 1e-4


def test_one_frame_and_none():
    assert not reverse(FlowField.zeros(1, 5, 5)).displacement.any()
    with pytest.raises(FlowError, match="at least one frame"):
        rebase(FlowField.zeros(2, 5, 5), [])


def neighbours(field: FlowField):
    """Flow of each frame to the one before, for the square."""
    steps = []
    for index in range(1, len(field)):
        moved = (field.displacement[index, :1] != 0).float()
        step = torch.cat([moved * -4, moved * 0])
        hidden = torch.zeros_like(moved)
        hidden[0, 20:30, 10 + 4 * (index - 1) : 10 + 4 * index] = 1
        steps.append((step, hidden))
    return steps


def test_steps_to_the_frame_before_are_chained_to_frame_1():
    _, field = moving_square()
    chained = from_previous(neighbours(field))
    # Steps call hidden what the square leaves, whether or not frame 1 showed it.
    assert (chained.occlusion >= field.occlusion).all()
    seen = (chained.occlusion < 0.5).expand(-1, 2, -1, -1)
    assert torch.equal(chained.displacement[seen], field.displacement[seen])
    square = field.displacement != 0
    assert torch.equal(chained.displacement[square], field.displacement[square])


def test_steps_forward_are_turned_round():
    _, field = moving_square()
    forward = []
    for index in range(len(field) - 1):
        left = 10 + 4 * index
        step = torch.zeros(2, 48, 48)
        step[0, 20:30, left : left + 10] = 4
        hidden = torch.zeros(1, 48, 48)
        hidden[0, 20:30, left + 10 : left + 14] = 1  # what the square comes to cover
        forward.append((step, hidden))
    chained = from_previous(to_previous(forward))
    square = field.displacement[:, 0] != 0
    assert (chained.displacement - field.displacement).abs()[:, 0][square].max() < 1e-3
    assert not chained.occlusion[:, 0][square].any()
    # What the square left is unknown.
    assert chained.occlusion[1:, 0, 20:30, 11:13].all()
    away = torch.ones(48, 48, dtype=torch.bool)
    away[18:32, 8:38] = False
    assert not chained.displacement[..., away].any() and not chained.occlusion[..., away].any()


@quick
@given(st.integers(2, 5), st.floats(-3, 3), st.floats(-3, 3))
def test_a_pan_in_steps_either_way(frames, x, y):
    field = pan(frames, 16, 24, x, y)
    step = field.displacement[1]
    visible = torch.zeros(1, 16, 24)
    to_before = from_previous([(step, visible)] * (frames - 1))
    torch.testing.assert_close(to_before.displacement, field.displacement, atol=1e-4, rtol=0)
    to_next = from_previous(to_previous([(-step, visible)] * (frames - 1)))
    torch.testing.assert_close(to_next.displacement, field.displacement, atol=1e-3, rtol=0)
