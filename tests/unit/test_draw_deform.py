"""How a layer bends around few tracks, where rounding and great distances could show."""

import numpy as np
import pytest

from s2dm.flow.draw.deform import Bend

NEAR = 3.2


@pytest.mark.parametrize("radius", [None, 64.0])
def test_tracks_in_one_point_turn_nothing(radius):
    start = 777.7 + 1234.5j
    points = start + np.array([5, 20 - 15j, -50j])
    moved = Bend(points, np.full(5, start), NEAR, radius).at(np.full(5, start + 10))
    assert np.abs(moved - points - 10).max() < 1e-9
    apart = np.array([start + 10, start - 10, start + 3j])
    moved = Bend(points, np.full(3, start), NEAR, radius).at(apart)
    assert np.abs(moved - points - (apart.mean() - start)).max() < 1e-9


def test_a_region_turns_as_one_far_from_its_tracks():
    start = 100 + 100j
    points = start + np.array([300, 1000, 3800])
    moved = Bend(points, start + np.array([0, 4]), NEAR).at(start + np.array([0, 4j]))
    assert np.abs(moved - start - 1j * (points - start)).max() < 0.1
