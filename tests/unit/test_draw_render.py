"""Flow of drawn motion: exact where it can be said what is right."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from s2dm.flow import FlowError
from s2dm.flow.draw import CameraKey, Layer, Mask, Motion, Polygon, render


def track(*points: tuple[float, float]) -> np.ndarray:
    times = np.linspace(0, 1, len(points)) if len(points) > 1 else [0.0]
    return np.column_stack([np.array(points, float), times])


def box(left: float, top: float, right: float, bottom: float) -> Polygon:
    """From pixel to pixel, both included."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    outwards = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    return Polygon(np.array(corners) + np.array(outwards))


def rows(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().ravel().tolist()


@pytest.mark.parametrize("frames", [2, 16])
@pytest.mark.parametrize("move", ["rigid", "similarity", "affine", "free"])
def test_a_layer_moves_by_what_its_track_says_and_leaves_an_exact_strip(move, frames):
    layer = Layer(region=box(30, 50, 49, 79), tracks=(track((40, 64), (88, 64)),), move=move)
    drawing = render(Motion(128, 128, (layer,)), frames)
    flow = drawing.flow
    for index in range(1, frames):
        shift = 48 * index / (frames - 1)
        inside = drawing.cover[index, 0]
        assert inside.sum() == 20 * 30
        moved = flow.displacement[index][:, inside]
        assert (moved - torch.tensor([[-shift], [0.0]])).abs().max() < 0.01
        assert not flow.displacement[index][:, ~inside].any()
        assert not flow.occlusion[index, 0][inside].any()
    assert rows(drawing.cover[-1, 0, 64]) == list(range(78, 98))
    assert rows(drawing.cover[-1, 0, :, 88]) == list(range(50, 80))
    # What it left: all of its old place, as 48 pixels are more than its width.
    expected = torch.zeros(128, 128)
    expected[50:80, 30:50] = 1
    assert torch.equal(flow.occlusion[-1, 0], expected)


def test_a_strip_narrower_than_the_layer():
    layer = Layer(region=box(30, 50, 49, 79), tracks=(track((40, 64), (45, 61)),))
    flow = render(Motion(128, 96, (layer,)), 2).flow
    expected = torch.zeros(96, 128)
    expected[50:80, 30:50] = 1
    expected[47:77, 35:55] = 0
    assert torch.equal(flow.occlusion[1, 0], expected)


def test_layers_in_front_hide_those_behind():
    """Front goes right by 10 over the back, which shows beneath it and was hidden before."""
    back = Layer(region=box(20, 20, 59, 39))
    front = Layer(region=box(30, 20, 39, 39), tracks=(track((35, 30), (45, 30)),))
    there = render(Motion(96, 64, (back, front)), 2)
    assert rows(there.flow.occlusion[1, 0, 30]) == list(range(30, 40))
    assert rows(there.flow.displacement[1, 0, 30]) == list(range(40, 50))
    # The other way round it passes behind, and nothing is seen of it.
    behind = render(Motion(96, 64, (front, back)), 2).flow
    assert not behind.displacement.any() and not behind.occlusion.any()


def test_the_same_on_every_layer_is_the_ground_moving():
    """What lies where in frame 1 is what counts: a layer over a layer that move together."""
    tracks = (track((30, 30), (40, 33)),)
    motion = Motion(
        96,
        64,
        (
            Layer(region=box(20, 20, 49, 49), tracks=tracks),
            Layer(region=box(25, 25, 35, 35), tracks=tracks),
        ),
    )
    alone = Motion(96, 64, motion.layers[:1])
    one, two = render(alone, 5).flow, render(motion, 5).flow
    assert torch.equal(one.displacement, two.displacement)
    assert torch.equal(one.occlusion, two.occlusion)


def test_a_track_carries_its_surroundings():
    layer = Layer(tracks=(track((40, 64), (88, 64)),), radius=16)
    flow = render(Motion(128, 128, (layer,)), 16).flow
    square = torch.zeros(1, 1, 128, 128)
    square[..., 57:72, 33:48] = 1
    x = torch.arange(128.0)
    for index in range(16):
        seen = flow.warp(square)[index, 0] * (1 - flow.occlusion[index, 0])
        assert (seen.sum(0) * x).sum() / seen.sum() == pytest.approx(40 + 48 * index / 15, abs=0.1)
        assert seen.sum() == pytest.approx(square.sum().item(), rel=0.01)
    assert flow.occlusion[15, 0, 64, 40] == 1  # torn off on its way


def test_small_movements_tear_nothing():
    layer = Layer(tracks=(track((40, 64), (45, 61)),), radius=16)
    flow = render(Motion(128, 128, (layer,)), 4).flow
    assert not flow.occlusion.any()
    steps = flow.displacement.diff(dim=3).abs().max(), flow.displacement.diff(dim=2).abs().max()
    assert max(steps) < 1.5


def test_a_pin_turns_the_layer():
    """A forearm: pinned at the elbow, its hand led a quarter round."""
    angle = np.linspace(0, np.pi / 2, 9)
    hand = track(*zip(30 + 40 * np.cos(angle), 30 + 40 * np.sin(angle), strict=True))
    layer = Layer(region=box(28, 26, 72, 34), tracks=(hand,), pins=np.array([[30.0, 30]]))
    for move in ("rigid", "free"):
        moved = Layer(**{**vars(layer), "move": move})
        flow = render(Motion(96, 96, (moved,)), 9).flow
        # (30, 60) was at (60, 30).
        assert flow.displacement[8, :, 60, 30].tolist() == pytest.approx([30, -30], abs=0.02)
        assert flow.displacement[8, :, 30, 30].norm() < 0.02


def test_a_pin_stays_where_a_track_pulls_away():
    layer = Layer(
        region=box(20, 20, 79, 39),
        tracks=(track((70, 30), (100, 30)),),
        pins=np.array([[30.0, 30]]),
        move="rigid",
    )
    drawing = render(Motion(128, 64, (layer,)), 2)
    assert rows(drawing.cover[1, 0, 30]) == list(range(20, 80))
    assert drawing.flow.displacement[1].abs().max() < 0.1


def test_similarity_and_affine_follow_their_points():
    region = box(20, 20, 79, 79)
    start = [(30, 30), (70, 30), (30, 70)]

    def flow(move, ends):
        tracks = tuple(track(a, b) for a, b in zip(start, ends, strict=True))
        layer = Layer(region=region, tracks=tracks, move=move)
        return render(Motion(128, 128, (layer,)), 2).flow.displacement[1]

    larger = flow("similarity", [(25, 25), (75, 25), (25, 75)])  # by a quarter about (50, 50)
    assert larger[:, 65, 65].tolist() == pytest.approx([-3, -3], abs=1e-3)
    assert flow("rigid", [(25, 25), (75, 25), (25, 75)])[:, 45, 45].norm() == pytest.approx(
        2.357, abs=0.01
    )
    sheared = flow("affine", [(30, 30), (70, 30), (40, 70)])  # x + (y - 30) / 4
    assert sheared[:, 50, 60].tolist() == pytest.approx([-5, 0], abs=1e-3)


def test_free_layers_meet_all_of_their_tracks():
    rng = np.random.default_rng(0)
    starts = rng.uniform(60, 440, (12, 2))
    ends = starts + rng.uniform(-20, 20, (12, 2))
    tracks = tuple(track(a, b) for a, b in zip(starts.round(), ends.round(), strict=True))
    layer = Layer(region=box(20, 20, 479, 479), tracks=tracks)
    flow = render(Motion(500, 500, (layer,)), 2).flow
    for start, end in zip(starts.round(), ends.round(), strict=True):
        x, y = end.astype(int)
        assert flow.displacement[1, :, y, x].tolist() == pytest.approx(start - end, abs=0.02)


def picture_point(x, y, key, width, height):
    """Where frame 1 is seen at the pixel (x, y), by the formula of docs/motion.md, inverted."""
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    angle = np.deg2rad(key.roll)
    clockwise = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return clockwise @ (np.array([x + key.x, y + key.y]) - centre) / key.zoom + centre


@pytest.mark.parametrize(
    "key",
    [
        CameraKey(1, x=20, y=-7.5),
        CameraKey(1, zoom=2),
        CameraKey(1, zoom=0.5),
        CameraKey(1, roll=30),
        CameraKey(1, x=10, y=5, zoom=1.5, roll=-200),
    ],
)
def test_the_camera_against_its_closed_form(key):
    width, height = 160, 96
    flow = render(Motion(width, height, camera=(key,)), 5).flow
    for index in range(5):
        share = index / 4
        now = CameraKey(share, share * key.x, share * key.y, key.zoom**share, share * key.roll)
        for x, y in ((0, 0), (80, 50), (159, 95), (31, 77)):
            expected = picture_point(x, y, now, width, height)
            found = np.array([x, y]) + flow.displacement[index, :, y, x].numpy()
            assert found == pytest.approx(expected, abs=1e-3)
            outside = not (-0.5 <= expected[0] < width - 0.5 and -0.5 <= expected[1] < height - 0.5)
            if index:
                assert bool(flow.occlusion[index, 0, y, x]) == outside


def test_the_camera_is_seen_from_its_first_place():
    moved = (CameraKey(0, x=30, zoom=2, roll=10), CameraKey(1, x=30, zoom=2, roll=10))
    flow = render(Motion(64, 64, camera=moved), 3).flow
    assert flow.displacement.abs().max() < 1e-4 and not flow.occlusion.any()


def test_objects_move_under_the_camera():
    layer = Layer(region=box(30, 30, 49, 49), tracks=(track((40, 40), (60, 40)),))
    flow = render(Motion(128, 96, (layer,), (CameraKey(1, x=10),)), 2).flow
    assert flow.displacement[1, :, 40, 50].tolist() == [-10, 0]  # 20 right, seen 10 further left
    assert flow.displacement[1, :, 80, 50].tolist() == [10, 0]
    assert rows(flow.occlusion[1, 0, 40]) == [*range(20, 40), *range(118, 128)]


def test_parallax():
    """A near block before a far wall: the pan moves the block, tears a strip and hides another."""
    depth = torch.zeros(1, 1, 64, 128)
    depth[..., 20:40, 40:60] = 1
    flow = render(Motion(128, 64, camera=(CameraKey(1, x=12),)), 2, depth).flow
    assert flow.displacement[1, :, 30, 38].tolist() == [12, 0]  # the block, 12 to the left
    assert not flow.displacement[1, :, 10, 38].any()
    assert not flow.displacement[1, :, 30, 80].any()
    torn = rows(flow.occlusion[1, 0, 30])
    assert torn and set(torn) <= set(range(46, 61)) and len(torn) in range(10, 15)
    half = render(Motion(128, 64, camera=(CameraKey(1, x=12),)), 2, depth * 0 + 0.5).flow
    assert (half.displacement[1, 0] - 6).abs().max() < 1e-4


def test_one_frame_and_nothing_drawn():
    layer = Layer(region=box(1, 1, 4, 4), tracks=(track((2, 2), (9, 2)),))
    one = render(Motion(32, 16, (layer,)), 1)
    assert one.flow.num_frames == 1 and one.cover.sum() == 16
    still = render(Motion(32, 16, (Layer(), Layer(region=box(50, 50, 60, 60)))), 4)
    assert not still.flow.displacement.any() and not still.cover.any()
    with pytest.raises(FlowError, match="at least 1, got 0"):
        render(Motion(32, 16), 0)


@pytest.mark.parametrize("region", [None, box(0, 0, 31, 31)])
def test_points_far_outside_and_all_in_one_place(region):
    far = (track((-500, 2000), (90_000, -90_000)),)
    heap = tuple(track((10, 10), (10 + k, 12)) for k in range(20))
    for tracks in (far, heap, (*far, *heap)):
        for move in ("rigid", "similarity", "affine", "free"):
            layer = Layer(region=region, tracks=tracks, move=move)
            flow = render(Motion(64, 48, (layer,), (CameraKey(1, zoom=100, roll=3000),)), 3).flow
            assert torch.isfinite(flow.displacement).all()


def test_what_shrinks_to_a_point_is_gone():
    tracks = (track((10, 10), (20, 20)), track((30, 30), (20, 20)))
    layer = Layer(region=box(5, 5, 34, 34), tracks=tracks, move="similarity")
    drawing = render(Motion(64, 48, (layer,)), 2)
    assert drawing.cover[1].sum() <= 1 and drawing.flow.occlusion[1].sum() >= 899


def test_a_thousand_tracks():
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 128, (1000, 2))
    tracks = tuple(track((x, y), (x + 5, y)) for x, y in starts)
    flow = render(Motion(128, 128, (Layer(tracks=tracks, radius=8),)), 2).flow
    assert (flow.displacement[1, 0, 20:100, 20:100] + 5).abs().max() < 0.05


@pytest.mark.slow
def test_pictures_of_4096_pixels():
    layer = Layer(region=box(1000, 1000, 2999, 1999), tracks=(track((2000, 1500), (2100, 1500)),))
    flow = render(Motion(4096, 4096, (layer,)), 2).flow
    assert flow.occlusion[1].sum() == 100 * 1000
    assert (flow.displacement[1, :, 1500, 2500] - torch.tensor([-100.0, 0])).norm() < 0.01


def test_a_mask_of_another_size_covers_the_whole_picture():
    cells = np.zeros((4, 8), bool)
    cells[1, 2] = True
    layer = Layer(region=Mask(cells), tracks=(track((0, 0), (16, 0)),))
    drawing = render(Motion(64, 32, (layer,)), 2)
    assert rows(drawing.cover[1, 0].any(0)) == list(range(32, 40))
    assert rows(drawing.cover[1, 0].any(1)) == list(range(8, 16))


def test_lines_that_cross_fill_as_on_a_canvas():
    """By winding number: the star's middle belongs to it."""
    angle = -np.pi / 2 + np.arange(5) * 4 * np.pi / 5
    star = Polygon(np.stack([32 + 30 * np.cos(angle), 32 + 30 * np.sin(angle)], axis=1))
    drawing = render(Motion(64, 64, (Layer(region=star),)), 1)
    assert drawing.cover[0, 0, 32, 32]
    assert not drawing.cover[0, 0, 10, [10, 54]].any()


def test_time_runs_as_it_is_told():
    path = track((20, 20), (32, 20))

    def x(frames, **time):
        layer = Layer(region=box(15, 15, 25, 25), tracks=(path,), **time)
        cover = render(Motion(64, 40, (layer,)), frames).cover
        return [rows(frame[0, 20])[0] - 15 for frame in cover]

    assert x(13) == list(range(13))
    assert x(3, speed="ease") == [0, 6, 12]
    assert x(3, speed="ease_in") == [0, 3, 12]
    assert x(3, speed="ease_out") == [0, 9, 12]
    assert x(3, speed="hold") == [0, 0, 12]
    assert x(4, repeat="ping_pong") == [0, 6, 12, 6]
    assert x(12, repeat="loop") == list(range(12))
    assert x(12, repeat="loop", cycles=2) == [0, 2, 4, 6, 8, 10] * 2


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, 8, 8), torch.full((1, 1, 16, 32), 2.0)])
def test_a_depth_that_does_not_fit(bad):
    with pytest.raises(FlowError, match=r"^depth: expected"):
        render(Motion(32, 16), 2, bad)


def test_memory_beside_the_result_does_not_grow_with_the_frames(monkeypatch):
    # One frame at a time: otherwise it is by chance how many are drawn at once.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    width, height = 160, 128
    hand = track((60, 60), (90, 40))
    layers = (
        Layer(region=box(30, 30, 90, 90), tracks=(hand,), pins=np.array([[40.0, 80]])),
        Layer(tracks=(track((110, 64), (120, 80)),), radius=20),
    )
    motion = Motion(width, height, layers, camera=(CameraKey(1.0, 9, 0, 1.1, 5),))

    def beside(frames: int) -> int:
        tracemalloc.start()
        try:
            render(motion, frames)
            return tracemalloc.get_traced_memory()[1] - 13 * width * height * frames
        finally:
            tracemalloc.stop()

    beside(2)
    few, many = beside(27), beside(81)
    # What each frame adds beyond 13 bytes a pixel: its camera and the places of the tracks.
    assert many < few + 54 * 2000
