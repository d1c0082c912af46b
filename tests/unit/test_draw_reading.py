"""Drawn motion and paths as JSON: of the editor, of other tools, and broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError
from s2dm.flow.draw import Layer, Mask, Polygon, read_motion, read_tracks, render

STATE = {
    "version": 1,
    "width": 64,
    "height": 32,
    "frames": 16,
    "layers": [
        {
            "name": "arm",
            "region": {"polygon": [[1, 2], [9, 2], [9, 12.5]]},
            "tracks": [[{"x": 3, "y": 4}, {"x": 5, "y": 4, "t": 0.25}, {"x": 9, "y": 4}]],
            "pins": [{"x": 1, "y": 2}],
            "move": "rigid",
            "speed": "ease",
            "repeat": "loop",
            "cycles": 2,
        },
        {
            "region": {"runs": [3, 2, 3], "width": 4, "height": 2},
            "tracks": [[{"x": 3, "y": 4}, {"x": 4, "y": 5}]],
            "radius": 5,
            "colour": "#ff0000",
        },
    ],
    "camera": [{"t": 0}, {"t": 1, "x": 4, "zoom": 2, "roll": -90}],
}


def text(**changes) -> str:
    return json.dumps({**STATE, **changes})


def layer(**changes) -> str:
    return text(layers=[{**STATE["layers"][0], **changes}])


def test_a_state_is_read_as_it_is_written():
    motion = read_motion(text(), 64, 32)
    assert (motion.width, motion.height, motion.num_frames) == (64, 32, 16)
    arm, other = motion.layers
    assert arm.name == "arm" and isinstance(arm.region, Polygon)
    assert arm.tracks[0].tolist() == [[3, 4, 0], [5, 4, 0.25], [9, 4, 1]]
    assert arm.pins.tolist() == [[1, 2]]
    assert (arm.move, arm.speed, arm.repeat, arm.cycles) == ("rigid", "ease", "loop", 2)
    assert isinstance(other.region, Mask)
    assert other.region.cells.tolist() == [[False, False, False, True], [True, False, False, False]]
    assert (other.radius, other.move, other.repeat) == (5, "free", "once")
    assert [(key.t, key.x, key.zoom, key.roll) for key in motion.camera] == [
        (0, 0, 1, 0),
        (1, 4, 2, -90),
    ]


def test_a_drawing_is_resized_with_the_picture():
    motion = read_motion(text(), 128, 96)
    assert motion.layers[0].tracks[0][0].tolist() == [6.5, 13, 0]  # by 2 and 3 about the corner
    assert motion.layers[0].region.corners[0].tolist() == [2.5, 7]
    assert motion.camera[1].x == 8
    assert motion.layers[1].radius == pytest.approx(5 * 6**0.5)


def test_a_resized_drawing_makes_resized_flow():
    box = {"polygon": [[7.5, 7.5], [23.5, 7.5], [23.5, 19.5], [7.5, 19.5]]}
    tracks = [[{"x": 10, "y": 10}, {"x": 14, "y": 10}]]
    state = text(layers=[{"region": box, "tracks": tracks}], camera=[])
    small = render(read_motion(state, 64, 32), 3).flow
    large = render(read_motion(state, 128, 64), 3).flow
    expected = small.displacement[2].repeat_interleave(2, 1).repeat_interleave(2, 2) * 2
    assert torch.equal(large.displacement[2], expected)


@pytest.mark.parametrize("empty", ["", "  \n", "[]", "null", '{"layers": []}', '{"camera": null}'])
def test_nothing_drawn_is_still(empty):
    motion = read_motion(empty, 20, 10)
    assert (motion.width, motion.height) == (20, 10) and not motion.layers


@pytest.mark.parametrize(
    "paths",
    [
        '[[{"x": 3, "y": 4}, {"x": 5, "y": 4}, {"x": 9, "y": 4}]]',
        '[{"x": 3, "y": 4}, {"x": 5, "y": 4}, {"x": 9, "y": 4}]',
        "[{'x': 3, 'y': 4}, {'x': 5, 'y': 4}, {'x': 9, 'y': 4}]",
    ],
)
def test_paths_of_other_tools(paths):
    expected = [[3, 4, 0], [5, 4, 0.5], [9, 4, 1]]
    assert [track.tolist() for track in read_tracks(paths)] == [expected]
    (only,) = read_motion(paths, 64, 32).layers
    assert only.region is None and only.tracks[0].tolist() == expected and only.radius == 4


def test_tracks_of_a_state():
    assert [len(track) for track in read_tracks(text())] == [3, 2]


def test_points_between_times_are_spread_evenly():
    points = [{"x": k, "y": 0} for k in range(6)]
    points[1]["t"], points[4]["t"] = 0.5, 0.8
    (track,) = read_tracks(json.dumps(points))
    assert track[:, 2] == pytest.approx([0, 0.5, 0.6, 0.7, 0.8, 1])
    assert read_tracks('[{"x": 1, "y": 2}]')[0].tolist() == [[1, 2, 0]]
    assert read_tracks("[[]]") == ()
    # A byte-order mark, as some editors write it.
    assert read_tracks('\ufeff [{"x": 1, "y": 2}]')[0].tolist() == [[1, 2, 0]]
    assert read_tracks("\ufeff") == ()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"motion: expected JSON, got something else in line 1, column 2"),
        ('{"x": [1, 2', r"motion: expected JSON"),
        ("12", r"motion: expected an object with layers, or a list of paths, got 12"),
        ('"[]"', r"motion: expected an object"),
        ('{"nodes": [], "links": []}', r"motion: .* got one with links, nodes\. This is the JSON"),
        (text(version=2), r"version: expected 1, got 2\. .*update"),
        (text(width=0), r"width: expected a number from 1 to 8192, got 0"),
        (text(width=2.5), r"width: expected a whole number, got 2\.5"),
        (text(height="32"), r'height: expected a number from 1 to 8192, got "32"'),
        (text(layers={}), r"layers: expected a list, got an object of 0"),
        (text(layers=[1]), r"layers\[0\]: expected an object, got 1"),
        (text(layers=[{}] * 65), r"layers: expected at most 64, got 65"),
        (layer(tracks=[[{"x": 1, "y": 2}, {"x": "a", "y": 2}]]),
         r'layers\[0\]\.tracks\[0\]\[1\]\.x: expected a number from .* got "a"'),
        (layer(tracks=[[{"x": 1}]]), r"tracks\[0\]\[0\]\.y: expected a number .* got nothing"),
        (layer(tracks=[[[1, 2]]]), r"tracks\[0\]\[0\]: expected an object .*, got a list of 2"),
        (layer(tracks=[{"x": 1, "y": 2}]), r"tracks\[0\]: expected a list of points"),
        (layer(tracks=[[{"x": 1, "y": 2, "t": 2}]]), r"\[0\]\.t: expected a number from 0 to 1"),
        (layer(tracks=[[{"x": 1, "y": 2, "t": 0.9}, {"x": 1, "y": 2, "t": 0.1}]]),
         r"tracks\[0\]\[1\]\.t: expected points in order of time, got 0\.1 after 0\.9"),
        (layer(pins=[{"x": 1e9, "y": 0}]), r"pins\[0\]\.x: expected a number from -100000 to"),
        (layer(pins=[{"x": True, "y": 0}]), r"pins\[0\]\.x: .* got true"),
        (layer(move="stiff"), r'move: expected one of rigid, .*, free, got "stiff"'),
        (layer(speed=[]), r"speed: expected one of .* got a list of 0"),
        (layer(cycles=0), r"cycles: expected a number from 1"),
        (layer(radius=-1), r"radius: expected a number from 0\.5"),
        (layer(region=[1]), r"region: expected an object, got a list"),
        (layer(region={}), r"region: expected null, a polygon or runs, got an object with no keys"),
        (layer(region={"polygon": [[1, 2, 3]]}), r"polygon\[0\]: expected a corner, \[x, y\]"),
        (layer(region={"polygon": [[1, None]]}), r"polygon\[0\]\[1\]: expected a number"),
        (layer(region={"runs": [3], "width": 2, "height": 2}), r"runs: .* 2 x 2 = 4, got 3"),
        (layer(region={"runs": [5, -1], "width": 2, "height": 2}), r"runs\[1\]: expected a whole"),
        (layer(region={"runs": [], "width": 9000, "height": 2}), r"region\.width: expected"),
        (text(camera=[{"t": 0, "zoom": 0}]), r"camera\[0\]\.zoom: expected a number from 0\.01"),
        (text(camera=[{"t": 1}, {"t": 0.5}]), r"camera\[1\]\.t: expected keys in order of time"),
        ('[{"x": NaN, "y": 1}]', r"motion: expected JSON with ordinary numbers, got NaN"),
        ('[{"x": 1e999, "y": 1}]', r"\[0\]\[0\]\.x: expected a number"),
        ('[{"x": ' + "9" * 5000 + "}]", r"motion: expected JSON with ordinary numbers"),
        ("[" * 100_000 + "]" * 100_000, r"brackets nested too deep"),
        ("[" * 500 + "]" * 500, r"\[0\]\[0\]: expected an object like"),
        ("[" + "[]," * 2001 + "[]]", r"tracks: expected at most 2000"),
        ("x" * (33 << 20), r"at most 32 million characters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(bad, message):
    with pytest.raises(FlowError, match=message):
        read_motion(bad, 64, 32)


def test_coordinates_that_are_no_list():
    with pytest.raises(FlowError, match=r"coordinates: expected a list of paths, got an object"):
        read_tracks('{"points": []}')
    with pytest.raises(FlowError, match=r"coordinates: expected a text"):
        read_tracks(None)


NUMBER = st.floats(-200, 200) | st.integers(-5, 80)
POINT = st.fixed_dictionaries({"x": NUMBER, "y": NUMBER})
REGION = st.none() | st.fixed_dictionaries(
    {"polygon": st.lists(st.tuples(NUMBER, NUMBER), max_size=6)}
)
LAYER = st.fixed_dictionaries(
    {},
    optional={
        "region": REGION,
        "tracks": st.lists(st.lists(POINT, max_size=3), max_size=3),
        "pins": st.lists(POINT, max_size=2),
        "radius": st.floats(0.5, 60),
        "move": st.sampled_from(["rigid", "similarity", "affine", "free"]),
        "speed": st.sampled_from(["linear", "ease", "hold"]),
        "repeat": st.sampled_from(["once", "loop", "ping_pong"]),
        "cycles": st.floats(1, 5),
    },
)
KEY = st.fixed_dictionaries({}, optional={"x": NUMBER, "zoom": st.floats(0.1, 9), "roll": NUMBER})
DRAWING = st.fixed_dictionaries(
    {"layers": st.lists(LAYER, max_size=3), "camera": st.lists(KEY, max_size=2)}
)


@settings(max_examples=60, deadline=None)
@given(DRAWING, st.integers(1, 4))
def test_whatever_is_drawn_is_a_flow(state, frames):
    drawing = render(read_motion(json.dumps(state), 40, 24), frames)
    assert drawing.flow.displacement.shape == (frames, 2, 24, 40)
    assert set(drawing.flow.occlusion.unique().tolist()) <= {0, 1}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["x", "y", "t", "layers", "tracks", "region", "runs", "width", "camera"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(ANY)
def test_any_json_is_read_or_refused_in_words(content):
    try:
        motion = read_motion(json.dumps(content), 16, 16)
    except FlowError as error:
        assert "expected" in str(error)
    else:
        assert all(isinstance(one, Layer) for one in motion.layers)
        assert all(np.isfinite(track).all() for one in motion.layers for track in one.tracks)


def test_a_layer_that_the_editor_hides_is_left_out():
    layers = [{"name": "hidden", "visible": False}, {"name": "shown", "visible": True}]
    motion = read_motion(json.dumps({"layers": layers}), 16, 16)
    assert [layer.name for layer in motion.layers] == ["shown"]
