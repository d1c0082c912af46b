"""The colour wheel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField, flow_to_image


def field_of(*vectors: tuple[float, float]) -> FlowField:
    """A still frame, then one frame of one pixel a vector."""
    displacement = torch.tensor([(0.0, 0.0), *vectors]).view(-1, 2, 1, 1)
    return FlowField(displacement, torch.zeros(len(displacement), 1, 1, 1))


def colours(*vectors: tuple[float, float], **options) -> torch.Tensor:
    return flow_to_image(field_of(*vectors), **options)[:, :, 0, 0]


def test_no_motion_is_white():
    assert (flow_to_image(FlowField.zeros(3, 4, 5)) == 1).all()


def test_directions_have_their_own_colours():
    _, right, down, left, up = colours((4, 0), (0, 4), (-4, 0), (0, -4))
    torch.testing.assert_close(right, torch.tensor([1.0, 0.0, 0.0]))
    assert down[0] > 0.9 and down[1] > 0.8 and down[2] < 0.1  # yellow
    assert left[2] == 1 and left[0] == 0  # blue
    assert up[2] == 1 and up[1] == 0 and up[0] > 0  # violet


@settings(max_examples=50, deadline=None)
@given(st.floats(-9, 9), st.floats(-9, 9))
def test_the_longest_motion_is_fully_coloured_whatever_its_sign(x, y):
    pixel = colours((x, y))[1]
    assert ((pixel >= 0) & (pixel <= 1)).all()
    if x * x + y * y >= 1:
        assert pixel.min() < 1e-3 and pixel.max() > 1 - 1e-3


def test_one_scale_holds_for_the_whole_clip():
    half = colours((4, 0), (8, 0))[1]
    torch.testing.assert_close(half, torch.tensor([1.0, 0.5, 0.5]))


def test_a_given_scale_makes_clips_comparable():
    torch.testing.assert_close(colours((4, 0), max_magnitude=8)[1], colours((4, 0), (8, 0))[1])
    too_long = colours((9, 0), max_magnitude=8)[1]
    torch.testing.assert_close(too_long, torch.tensor([0.75, 0.0, 0.0]))
    with pytest.raises(FlowError, match="above 0"):
        colours((4, 0), max_magnitude=-1)
