"""Two motions as one, and changes to a flow as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s2dm.flow import FlowError, FlowField
from s2dm.flow.combine import combine_after, combine_in, combine_over
from s2dm.flow.draw import CameraKey, Layer, Motion, Polygon, render
from s2dm.flow.edit import flip, keep_in, loop, ping_pong, smooth_in_space, smooth_in_time

WIDTH, HEIGHT = 64, 48


def square(*points: tuple[float, float], camera=(), frames: int = 5) -> FlowField:
    """A square of 10 pixels that is led along a path, under a camera."""
    x, y = points[0]
    corners = np.array([(x - 5, y - 5), (x + 5, y - 5), (x + 5, y + 5), (x - 5, y + 5)]) - 0.5
    path = np.column_stack([np.array(points, float), np.linspace(0, 1, len(points))])
    layer = Layer(region=Polygon(corners), tracks=(path,))
    return render(Motion(WIDTH, HEIGHT, (layer,), camera), frames).flow


def assert_equal(one: FlowField, two: FlowField):
    torch.testing.assert_close(one.occlusion, two.occlusion, atol=1e-3, rtol=0)
    seen = two.occlusion < 0.5
    difference = (one.displacement - two.displacement).abs().amax(dim=1, keepdim=True)
    assert difference[seen].max() < 1e-3


def test_a_camera_over_objects_is_as_if_drawn_together():
    camera = (CameraKey(1, x=8, y=-4),)
    objects, seen = square((20, 20), (36, 24)), render(Motion(WIDTH, HEIGHT, (), camera), 5).flow
    assert_equal(combine_over(objects, seen), square((20, 20), (36, 24), camera=camera))


def test_one_motion_after_another():
    first, second = square((20, 20), (28, 20)), square((28, 20), (28, 36))
    both = combine_after(first, second)
    assert len(both) == 9
    whole = square((20, 20), (28, 20), (28, 36), frames=9)
    # Of what the square leaves after its turn, only the drawing knows that frame 1 shows it.
    assert (both.occlusion >= whole.occlusion).all()
    seen = (both.occlusion < 0.5).expand(-1, 2, -1, -1)
    assert torch.equal(both.displacement[seen], whole.displacement[seen])
    square_there = whole.displacement != 0
    assert torch.equal(both.displacement[square_there], whole.displacement[square_there])


def test_two_motions_side_by_side():
    left, right = square((20, 20), (28, 20)), square((44, 20), (44, 30))
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., :36] = 1
    both = combine_in(left, right, mask)
    assert torch.equal(both.displacement[..., :36], left.displacement[..., :36])
    assert torch.equal(both.displacement[..., 36:], right.displacement[..., 36:])
    assert both.occlusion.sum() == left.occlusion.sum() + right.occlusion.sum()


def test_flows_that_do_not_fit():
    flow = square((20, 20), (28, 20))
    with pytest.raises(FlowError, match="same number of frames, got 5 and 4"):
        combine_over(flow, flow.retime(4))
    with pytest.raises(FlowError, match="one size, got 64x48 and 8x8"):
        combine_after(flow, flow.resize(8, 8))
    with pytest.raises(FlowError, match=r"^mask: expected \(1 or 5,1,h,w\)"):
        combine_in(flow, flow, torch.zeros(3, 1, 8, 8))


def test_order_of_frames():
    flow = square((20, 20), (28, 20), frames=3)
    moved = [0, -4, -8]

    def at(edited):
        centres = edited.displacement[:, 0].flatten(1).min(dim=1).values
        return centres.tolist()

    assert at(loop(flow, 2)) == moved * 2
    assert at(ping_pong(flow, 2)) == [0, -4, -8, -4] * 2
    assert at(ping_pong(flow.select([0]))) == [0]
    with pytest.raises(FlowError, match="1 or more times"):
        loop(flow, 0)
    with pytest.raises(FlowError, match="at most 100000 frames"):
        loop(flow, 10**9)


@pytest.mark.parametrize(("axis", "x", "y"), [("horizontal", 43, 20), ("vertical", 20, 27)])
def test_mirror_images(axis, x, y):
    flipped = flip(square((20, 20), (28, 24)), axis)
    sign = (-1, 1) if axis == "horizontal" else (1, -1)
    expected = square((x, y), (x + 8 * sign[0], y + 4 * sign[1]))
    assert flipped.displacement.abs().sum() == expected.displacement.abs().sum()
    again = flip(flipped, axis)
    assert torch.equal(again.displacement, square((20, 20), (28, 24)).displacement)
    with pytest.raises(FlowError, match="axis: expected horizontal or vertical"):
        flip(flipped, "diagonal")


def test_smoothing_in_space_keeps_a_pan_and_shares_what_differs():
    pan = render(Motion(WIDTH, HEIGHT, (), (CameraKey(1, x=6),)), 3).flow
    smooth = smooth_in_space(pan, 4)
    torch.testing.assert_close(smooth.displacement, pan.displacement, atol=1e-4, rtol=0)
    noisy = pan.displacement + torch.randn(pan.displacement.shape) * 0.5
    noisy[0] = 0
    quiet = smooth_in_space(FlowField(noisy, pan.occlusion), 3)
    error = (quiet.displacement - pan.displacement)[1:]
    assert error.std() < 0.1 and not quiet.displacement[0].any()
    assert smooth_in_space(pan, 0) is pan


def test_smoothing_ignores_what_is_occluded():
    flow = FlowField.zeros(2, 8, 32)
    flow.displacement[1, 0, :, 16:], flow.occlusion[1, 0, :, 16:] = 100, 1
    assert smooth_in_space(flow, 2).displacement[1, 0, :, :14].max() < 1


def test_smoothing_in_time_keeps_even_motion_and_frame_1():
    pan = render(Motion(8, 6, (), (CameraKey(1, x=6, y=2),)), 9).flow
    torch.testing.assert_close(smooth_in_time(pan, 1.5).displacement, pan.displacement)
    jumpy = pan.displacement.clone()
    jumpy[3:6] += 2
    smooth = smooth_in_time(FlowField(jumpy, pan.occlusion), 1)
    assert smooth.displacement.diff(dim=0).abs().max() < jumpy.diff(dim=0).abs().max() - 0.5
    assert not smooth.displacement[0].any()
    assert smooth_in_time(pan.select([0, 1]), 3).num_frames == 2


def test_motion_within_a_mask():
    pan = render(Motion(WIDTH, HEIGHT, (), (CameraKey(1, x=6),)), 3).flow
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 20:40] = 1
    hard, soft = keep_in(pan, mask), keep_in(pan, mask, feather=8)
    assert hard.displacement[2, 0, 10].nonzero().ravel().tolist() == list(range(20, 40))
    assert soft.displacement[2, 0, 10, 30] == pytest.approx(6, abs=0.01)
    assert soft.displacement[2, 0, 10, 20] == pytest.approx(3, abs=1)
    assert soft.displacement[2, 0, 10, 10] < 0.05
