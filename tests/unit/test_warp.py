"""A picture moved by a flow: what frame 1 shows, and how holes are filled."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField
from s2dm.flow.warp import visibility, warp_picture

SIZE = 32


def picture(seed=0, size=(SIZE, SIZE)):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def slid(x: float, y: float = 0.0, size=(SIZE, SIZE)) -> FlowField:
    """Two frames; in the second everything stands (x, y) further."""
    displacement = torch.zeros(2, 2, *size)
    displacement[1] = torch.tensor([-x, -y]).view(2, 1, 1)
    return FlowField(displacement, torch.zeros(2, 1, *size))


def square_that_left(unmarked: bool) -> FlowField:
    """A square of 8 pixels moves 12 to the right over a still ground.

    Its old place shows ground that frame 1 doesn't; `unmarked` leaves that out of the occlusion.
    """
    displacement, occlusion = torch.zeros(2, 2, SIZE, SIZE), torch.zeros(2, 1, SIZE, SIZE)
    displacement[1, 0, 12:20, 16:24] = -12
    if not unmarked:
        occlusion[1, 0, 12:20, 4:12] = 1
    return FlowField(displacement, occlusion)


@given(x=st.integers(-40, 40), y=st.integers(-40, 40))
@settings(max_examples=25, deadline=None)
def test_what_comes_in_from_outside_is_not_shown(x, y):
    shown = visibility(slid(x, y))
    assert shown[0].all()
    expected = torch.zeros(SIZE, SIZE)
    expected[max(y, 0) : max(SIZE + y, 0), max(x, 0) : max(SIZE + x, 0)] = 1
    assert torch.equal(shown[1, 0], expected)


@pytest.mark.parametrize("unmarked", [False, True])
def test_the_old_place_of_what_moved_is_a_hole_even_if_nobody_says_so(unmarked):
    shown = visibility(square_that_left(unmarked))
    hole = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    hole[12:20, 4:12] = True
    assert torch.equal(shown[1, 0] == 0, hole)


def test_before_a_camera_that_moves_it_is_the_ground_that_is_hidden():
    """Against the rest of the picture, not against its frame: a person who stands, a pan."""
    displacement = torch.zeros(2, 2, SIZE, SIZE)
    displacement[1, 0] = 6.0  # the camera turned right: all came from 6 pixels further right
    displacement[1, 0, 12:20, 12:20] = 0
    shown = visibility(FlowField(displacement, torch.zeros(2, 1, SIZE, SIZE)))
    assert shown[1, 0, 12:20, 12:20].all()
    assert not shown[1, 0, 12:20, 6:12].any()


def test_smooth_motion_hides_nothing():
    """A zoom out claims places twice, but by neighbours that move alike."""
    grid = torch.arange(SIZE) - (SIZE - 1) / 2
    out = torch.stack(torch.meshgrid(grid, grid, indexing="xy")) * -0.3
    field = FlowField(torch.stack([torch.zeros(2, SIZE, SIZE), out]), torch.zeros(2, 1, SIZE, SIZE))
    assert visibility(field).all()


def test_a_picture_moves_by_whole_pixels_exactly():
    frame = picture()
    moved = warp_picture(frame, slid(5, -3))
    assert torch.equal(moved[:1], frame)
    torch.testing.assert_close(moved[1, :, : SIZE - 3, 5:], frame[0, :, 3:, : SIZE - 5])


def test_holes_are_filled_from_what_lies_around_them_and_nothing_else_changes():
    frame = torch.full((1, 3, SIZE, SIZE), 0.25)
    frame[..., 12:20, 4:12] = 1.0  # the square stands here in frame 1
    field = square_that_left(unmarked=False)
    shown = visibility(field)
    filled = warp_picture(frame, field, shown=shown)
    expected = torch.full((3, SIZE, SIZE), 0.25)
    expected[:, 12:20, 16:24] = 1.0
    hole = shown[1] == 0
    torch.testing.assert_close(filled[1][:, hole[0]], expected[:, hole[0]], atol=0.02, rtol=0)
    assert torch.equal(filled[1][:, ~hole[0]], warp_picture(frame, field)[1][:, ~hole[0]])
    # Without filling the square stays behind as a ghost.
    assert warp_picture(frame, field)[1, 0, 15, 8] == 1


def test_parts_of_a_clip_are_parts_of_the_whole():
    displacement = torch.randn(7, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 3
    displacement[0] = 0
    field = FlowField(displacement, torch.zeros(7, 1, SIZE, SIZE))
    shown = visibility(field)
    whole = warp_picture(picture(), field, shown=shown)
    parts = [warp_picture(picture(), field, slice(k, k + 3), shown) for k in (0, 3, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_frame_that_is_all_hole_stays_as_it_is_and_grey_is_filled_too():
    field = slid(100)
    shown = visibility(field)
    assert np.isfinite(warp_picture(picture(), field, shown=shown)).all()
    grey = warp_picture(
        picture()[:, :1],
        square_that_left(False),
        shown=visibility(square_that_left(False)),
    )
    assert grey.shape == (2, 1, SIZE, SIZE)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(FlowError, match=r"expected \(1, C, 32, 32\), the flow's size"):
        warp_picture(picture(size=(16, 32)), slid(1))
