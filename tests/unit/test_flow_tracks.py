"""Paths of points out of a flow, and back into one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField
from s2dm.flow.draw import CameraKey, Layer, Motion, Polygon, read_tracks, render
from s2dm.flow.tracks import flow_to_tracks, grid_points, tracks_from_paths, tracks_to_json

SIZE, FRAMES = 128, 16


def path(start, end, bend=(0, 0)):
    time = np.linspace(0, 1, FRAMES)[:, None]
    points = np.array(start) + time * np.subtract(end, start)
    points = points + np.sin(np.pi * time) * np.array(bend)
    return np.column_stack([points, time])


PATHS = {
    "one": [path((40.3, 64.7), (80, 60), (0, 10))],
    "apart": [path((30, 30), (50, 34.5)), path((90, 30), (80, 50)), path((60, 90), (60.5, 110))],
    "near": [path((50, 50), (58, 53)), path((66, 50), (72, 47)), path((58, 66), (66, 68))],
}


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
def test_tracks_come_back_from_their_flow(paths):
    flow = render(Motion(SIZE, SIZE, (Layer(tracks=tuple(paths)),)), FRAMES).flow
    starts = torch.tensor(np.array([points[0, :2] for points in paths]))
    found, seen = flow_to_tracks(flow, starts)
    expected = torch.tensor(np.stack([points[:, :2] for points in paths], axis=1)).float()
    assert seen.all()
    assert (found - expected).norm(dim=2).max() <= 0.05
    # And as text.
    again = read_tracks(tracks_to_json(found))
    assert np.abs(np.stack([one[:, :2] for one in again], 1) - expected.numpy()).max() <= 0.051


EVERYWHERE = Polygon(np.array([(4, 4), (SIZE - 5, 4), (SIZE - 5, SIZE - 5), (4, SIZE - 5)], float))


def in_one_piece(starts, turn, grow, ripple=0.0, phase=0.0, time=1.0):
    """Where points (P,) complex of a picture are that turns, grows and ripples about its middle."""
    middle = SIZE / 2 * (1 + 1j)
    wave = np.exp(1j * ((starts * (0.05 - 0.04j)).real + phase))
    turned = (starts - middle) * (1 + time * grow) * np.exp(1j * time * turn)
    return middle + turned + time * ripple * wave


def comes_back(starts, ends, **layer):
    """By how much each of the tracks is missed, (P,) pixels; all have to be seen."""
    tracks = tuple(
        np.array([[a.real, a.imag, 0], [b.real, b.imag, 1]])
        for a, b in zip(starts, ends, strict=True)
    )
    flow = render(Motion(SIZE, SIZE, (Layer(tracks=tracks, **layer),)), 2).flow
    found, seen = flow_to_tracks(flow, torch.tensor(np.stack([starts.real, starts.imag], axis=1)))
    assert seen.all()
    return np.abs(found[1].double().numpy() @ (1, 1j) - ends)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 400),
    turn=st.floats(-0.5, 0.5),
    grow=st.floats(-0.2, 0.2),
    ripple=st.floats(0, 3),
    region=st.sampled_from([None, EVERYWHERE]),
    seed=st.integers(0, 2**16),
)
def test_tracks_that_agree_come_back_however_many_they_are(count, turn, grow, ripple, region, seed):
    """Few of them bend the sheet between them; of a crowd several lie in one of its triangles."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(32, SIZE - 32, (count, 2)) @ (1, 1j)
    ends = in_one_piece(starts, turn, grow, ripple, phase=seed)
    assert comes_back(starts, ends, region=region).max() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("turn", "grow"), [(1.4, -0.1), (1, 0.3), (0.2, -0.3)])
def test_a_thousand_tracks_all_over_a_picture_that_turns_as_one(turn, grow):
    """Those that leave it, and those right at the edge of what shrinks, too."""
    size, frames = 512, 4
    starts = np.random.default_rng(1).uniform(2, size - 3, (1000, 2)) @ (1, 1j)
    times = np.linspace(0, 1, frames)
    middle = size / 2 * (1 + 1j)
    paths = np.stack(
        [middle + (starts - middle) * (1 + grow * t) * np.exp(1j * turn * t) for t in times]
    )
    tracks = tuple(np.column_stack([one.real, one.imag, times]) for one in paths.T)
    flow = render(Motion(size, size, (Layer(tracks=tracks, radius=64),)), frames).flow
    found, seen = flow_to_tracks(flow, torch.tensor(np.stack([starts.real, starts.imag], axis=1)))
    inside = (np.minimum(paths.real, paths.imag) > 0) & (
        np.maximum(paths.real, paths.imag) < size - 1
    )
    assert inside[-1].sum() > 500 and seen.numpy()[inside].all()
    assert np.abs(found.double().numpy() @ (1, 1j) - paths)[inside].max() <= 0.05


@settings(max_examples=15, deadline=None)
@given(turn=st.floats(-1, 1), seed=st.integers(0, 2**16))
def test_a_few_tracks_that_turn_far_come_back(turn, seed):
    rng = np.random.default_rng(seed)
    starts = rng.uniform(24, SIZE - 24, (40, 2)) @ (1, 1j)
    apart = [0]
    for index in range(1, 40):
        if np.abs(starts[apart] - starts[index]).min() > 24:
            apart.append(index)
    starts = starts[apart[:3]]
    assert comes_back(starts, in_one_piece(starts, turn, 0)).max() <= 0.05


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_crowds_that_contradict_themselves_are_met_where_they_can_be(seed):
    """A sheet can't meet all of them: no track is further off than it is from what is around it."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(24, SIZE - 24, (300, 2)) @ (1, 1j)
    ends = starts + rng.uniform(-1, 1, (300, 2)) @ (1, 1j)
    tracks = tuple(
        np.array([[a.real, a.imag, 0], [b.real, b.imag, 1]])
        for a, b in zip(starts, ends, strict=True)
    )
    flow = render(Motion(SIZE, SIZE, (Layer(tracks=tracks),)), 2).flow
    found, seen = flow_to_tracks(flow, torch.tensor(np.stack([starts.real, starts.imag], axis=1)))
    missed = np.abs(found[1].double().numpy() @ (1, 1j) - ends)
    assert np.median(missed) <= 0.06 and missed.max() <= 4 and seen[1].float().mean() > 0.8


@pytest.mark.parametrize(
    ("x", "zoom", "roll"), [(10, 1.3, 10), (0, 0.3, 0), (0, 0.5, 60), (-7.5, 1, 170), (3, 2.5, -90)]
)
def test_tracks_of_a_camera(x, zoom, roll):
    """Also of one that turns and shrinks the picture so much that neighbours move far apart."""
    flow = render(Motion(SIZE, SIZE, (), (CameraKey(1, x=x, zoom=zoom, roll=roll),)), 2).flow
    # To the picture's outermost points that a pixel of it shows.
    points = torch.cat([grid_points(SIZE, SIZE, 32), SIZE / 2 + (SIZE / 2 - 2) * torch.tensor(
        [[-1.0, -1], [-1, 1], [1, -1], [1, 1], [0, 1], [0.3, -1], [1, 0.7], [-1, 0.2]]
    )])  # fmt: skip
    found, seen = flow_to_tracks(flow, points)
    centre = (SIZE - 1) / 2
    angle = np.deg2rad(roll)
    turn = torch.tensor([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]).float()
    expected = centre + zoom * (points - centre) @ turn.T - torch.tensor([float(x), 0])
    inside = ((expected > 0) & (expected < SIZE - 1)).all(dim=1)
    assert inside.sum() >= 4 and torch.equal(seen[1], inside)
    assert (found[1] - expected)[inside].norm(dim=1).max() < 0.01


def test_points_at_the_border_come_back():
    """Half a pixel beyond the outermost pixel centres there is nothing to look between."""
    flow = render(Motion(SIZE, SIZE, (), (CameraKey(1, roll=180),)), 2).flow
    points = torch.tensor([[-0.4, 50.0], [127.4, 127.4], [30, -0.4]])
    found, seen = flow_to_tracks(flow, points)
    assert seen.all() and (found[1] - (SIZE - 1 - points)).norm(dim=1).max() < 0.01


def test_a_hidden_point_goes_straight_on():
    """A ground point over which a box passes, from frame 2 to frame 4."""
    corners = np.array([(9.5, 9.5), (19.5, 9.5), (19.5, 19.5), (9.5, 19.5)])
    there = np.array([[15, 15, 0], [35, 15, 0.5], [55, 15, 1.0]])
    box = Layer(region=Polygon(corners), tracks=(there,))
    flow = render(Motion(80, 40, (box,)), 5).flow
    found, seen = flow_to_tracks(flow, torch.tensor([[34.0, 15.0], [15, 15]]))
    assert seen[:, 0].tolist() == [True, True, False, True, True] and seen[:, 1].all()
    assert torch.equal(found[:, 0], torch.tensor([[34.0, 15.0]]).expand(5, 2))
    assert found[:, 1, 0].tolist() == pytest.approx([15, 25, 35, 45, 55])


def test_a_grid_of_points():
    points = grid_points(64, 32, 16)
    assert points.tolist()[:2] == [[7.5, 7.5], [23.5, 7.5]] and len(points) == 8
    assert grid_points(8, 8, 100).tolist() == [[3.5, 3.5]]
    with pytest.raises(FlowError, match="at least 1 pixel, got 0"):
        grid_points(8, 8, 0)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[1.0, 1.0], [8.0, 1.0]], r"points\[1\]: expected a point of the picture, 8 x 4 pixels"),
        ([[float("nan"), 1.0]], r"points\[0\]: .* got \(nan, 1\)"),
        ([[1.0, 2.0, 3.0]], r"expected \(P,2\)"),
    ],
)
def test_points_outside(points, message):
    with pytest.raises(FlowError, match=message):
        flow_to_tracks(FlowField.zeros(2, 4, 8), torch.tensor(points))
    with pytest.raises(FlowError, match="1 to 10000 points"):
        flow_to_tracks(FlowField.zeros(2, 4, 8), torch.zeros(0, 2))


def test_paths_of_core():
    paths = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]])
    both = tracks_from_paths(paths)
    assert both[0].tolist() == [[1, 2, 0], [5, 6, 0.5], [9, 10, 1]]
    seen = torch.tensor([[True, False], [False, False], [True, False]])
    (one,) = tracks_from_paths(paths, seen)
    assert one.tolist() == [[1, 2, 0], [9, 10, 1]]
    (first, second) = tracks_from_paths(paths, torch.tensor([[1], [1], [0]]))
    assert len(first) == len(second) == 2


@pytest.mark.parametrize(
    ("paths", "seen", "message"),
    [
        (torch.zeros(3, 2), None, r"paths \(frames,points,2\), got \(3, 2\)"),
        (torch.full((2, 1, 2), float("inf")), None, "finite points"),
        (torch.zeros(3, 4, 2), torch.ones(3, 2), r"visibility \(3,4\)"),
    ],
)
def test_paths_that_are_none(paths, seen, message):
    with pytest.raises(FlowError, match=message):
        tracks_from_paths(paths, seen)


def test_the_text_is_what_other_tools_read():
    paths = torch.tensor([[[1.0, 2.5]], [[3, 4]]])
    assert json.loads(tracks_to_json(paths)) == [[{"x": 1, "y": 2.5}, {"x": 3, "y": 4}]]
