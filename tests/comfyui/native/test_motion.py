"""The nodes that draw, edit, move and keep flow, in a real ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfyui

BOX = {"polygon": [[29.5, 49.5], [49.5, 49.5], [49.5, 79.5], [29.5, 79.5]]}
DRAWN = {
    "version": 1,
    "width": 128,
    "height": 128,
    "layers": [{"region": BOX, "tracks": [[{"x": 40, "y": 64}, {"x": 88, "y": 64}]]}],
}
PATH = '[[{"x": 40, "y": 64}, {"x": 88, "y": 64}]]'


def white_square() -> torch.Tensor:
    image = torch.zeros(1, 128, 128, 3)
    image[:, 57:72, 33:48] = 1
    return image


def centre(image: torch.Tensor) -> float:
    across = image.sum(dim=(0, 2)) if image.ndim == 3 else image.sum(dim=0)
    return ((across * torch.arange(len(across))).sum() / across.sum()).item()


def test_a_drawing_moves_as_drawn(rig):
    flow, moving = rig.run("S2DMDrawFlow", motion=json.dumps(DRAWN), frames=16)
    assert (len(flow), flow.width, flow.height) == (16, 128, 128)
    assert flow.displacement[15, :, 64, 88].tolist() == [-48, 0]
    assert moving.shape == (16, 128, 128) and moving[15].sum() == 600 == flow.occlusion[15].sum()


def test_an_image_decides_the_size(rig):
    image = torch.zeros(2, 64, 256, 3)
    flow, _ = rig.run("S2DMDrawFlow", motion=json.dumps(DRAWN), frames=2, image=image)
    assert (flow.width, flow.height) == (256, 64)
    assert flow.displacement[1, 0].min() == -96


@pytest.mark.parametrize(
    ("motion", "message"),
    [
        ("{", r"^Draw Motion \(S2DM\): motion: expected JSON"),
        ('{"nodes": []}', r"^Draw Motion \(S2DM\): motion: .*JSON of something else"),
        ('{"layers": [{"move": 3}]}', r"^Draw Motion \(S2DM\): layers\[0\]\.move: expected one of"),
    ],
)
def test_a_broken_drawing_says_where(rig, motion, message):
    with pytest.raises(ValueError, match=message):
        rig.run("S2DMDrawFlow", motion=motion, frames=2)


def test_what_does_not_fit_into_memory_is_refused(rig):
    with pytest.raises(ValueError, match=r"^Draw Motion \(S2DM\): .*4096 frames of 8192x8192"):
        rig.run("S2DMDrawFlow", motion="", frames=4096, width=8192, height=8192)


def test_a_path_brings_a_square_to_its_end(rig):
    (flow,) = rig.run("S2DMTracksToFlow", coordinates=PATH, frames=16, radius=16.0)
    images, holes, masks, _ = rig.run(
        "S2DMWarpImage", flow=flow, image=white_square(), holes="black"
    )
    assert images.shape == (16, 128, 128, 3) and holes.shape == masks.shape == (16, 128, 128)
    assert centre(images[15]) == pytest.approx(88, abs=1)
    assert not masks.any()


def test_a_clip_may_be_longer_than_stage_1_knows(rig, node_classes):
    """Models for video take 81 frames and more."""
    for node in ("S2DMDrawFlow", "S2DMCameraFlow", "S2DMTracksToFlow", "S2DMPickFlow"):
        inputs = {socket.id: socket for socket in node_classes[node].GET_SCHEMA().inputs}
        assert inputs["frames"].max == 4096
    (flow,) = rig.run("S2DMTracksToFlow", coordinates=PATH, frames=81)
    assert len(flow) == 81


def test_a_path_of_very_many_points_makes_no_longer_clip(rig, monkeypatch):
    """Asked for as many frames as a path has points, the node makes at most what it could."""
    monkeypatch.setattr(rig.module("nodes.motion"), "MOST_FRAMES", 4)
    path = json.dumps([[{"x": 10 + number, "y": 64} for number in range(13)]])
    (flow,) = rig.run("S2DMTracksToFlow", coordinates=path, frames=0)
    assert flow.displacement[:, 0, 64, 22].tolist() == pytest.approx([0, -4, -8, -12], abs=0.01)


def test_a_drawing_of_the_editor_as_paths(rig):
    """Drawn at 128 x 128, used at 256 x 64."""
    (flow,) = rig.run(
        "S2DMTracksToFlow", coordinates=json.dumps(DRAWN), frames=2, width=256, height=64
    )
    assert flow.displacement[1].flatten(1).min(dim=1).values.tolist() == pytest.approx([-96, 0])


def test_core_s_visibility_may_be_a_list(rig):
    paths = torch.tensor([[[40.0, 64.0]], [[50, 64]]])
    tracks = {"track_path": paths, "track_visibility": [[1], [1]]}
    (flow,) = rig.run("S2DMTracksToFlow", coordinates="", frames=2, tracks=tracks)
    assert flow.displacement[1, 0].min() == pytest.approx(-10)


def test_paths_move_what_a_mask_shows(rig):
    mask = torch.zeros(1, 64, 64)
    mask[:, 10:20, 10:20] = 1  # of half the size
    (flow,) = rig.run("S2DMTracksToFlow", coordinates=PATH, frames=0, mask=mask)
    (same,) = rig.run("S2DMTracksToFlow", coordinates=PATH, frames=0, mask=mask[0])
    assert len(flow) == 2 and torch.equal(flow.displacement, same.displacement)
    assert (flow.displacement[1, 0] == -48).sum() == 400


def test_tracks_of_core_and_back(rig):
    paths = torch.tensor([[[40.0, 64.0], [90, 30]], [[50, 64], [90, 38]]])
    tracks = {"track_path": paths, "track_visibility": torch.ones(2, 2).bool()}
    (flow,) = rig.run("S2DMTracksToFlow", coordinates="", frames=0, tracks=tracks)
    points = '[{"x": 40, "y": 64}, {"x": 90, "y": 30}]'
    coordinates, found = rig.run("S2DMFlowToTracks", flow=flow, points=points)
    assert (found["track_path"] - paths).abs().max() < 0.05
    assert found["track_visibility"].all() and found["track_visibility"].shape == (2, 2)
    assert len(json.loads(coordinates)) == 2
    _, grid = rig.run("S2DMFlowToTracks", flow=flow, spacing=32.0)
    assert grid["track_path"].shape == (2, 16, 2)


def test_core_reads_our_tracks(rig):
    """Where core has them: the concatenation asks for their shapes."""
    core = pytest.importorskip("comfy_extras.nodes_wanmove")
    (flow,) = rig.run("S2DMTracksToFlow", coordinates=PATH, frames=5)
    coordinates, ours = rig.run("S2DMFlowToTracks", flow=flow, spacing=64.0)
    theirs, length = core.WanMoveTracksFromCoords.execute(coordinates).args
    assert length == 5 and torch.allclose(theirs["track_path"].cpu(), ours["track_path"], atol=1e-3)
    (both,) = core.WanMoveConcatTrack.execute(ours, theirs).args
    assert both["track_path"].shape == (5, 8, 2)
    (again,) = rig.run("S2DMTracksToFlow", coordinates="", tracks=both, frames=0)
    assert len(again) == 5


@pytest.mark.parametrize("inputs", [{"coordinates": ""}, {"coordinates": "", "tracks": "x"}])
def test_no_paths(rig, inputs):
    with pytest.raises(ValueError, match=r"^Tracks to Flow \(S2DM\): expected .*[Pp]aste coord"):
        rig.run("S2DMTracksToFlow", **inputs)


def test_the_camera(rig):
    (flow,) = rig.run("S2DMCameraFlow", frames=5, width=64, height=48, pan_x=8.0, speed="ease")
    assert flow.displacement[:, 0, 20, 20].tolist() == pytest.approx([0, 1.25, 4, 6.75, 8])
    depth = torch.zeros(1, 24, 32, 3)
    (far,) = rig.run("S2DMCameraFlow", frames=5, width=64, height=48, pan_x=8.0, depth=depth)
    assert not far.displacement.any()
    (of_picture,) = rig.run("S2DMCameraFlow", frames=2, image=torch.zeros(1, 24, 40, 3))
    assert (of_picture.height, of_picture.width) == (24, 40)


EDITS = {
    "scale": ({"amount": 2.0}, (16, 128, 128)),
    "reverse": ({}, (16, 128, 128)),
    "retime": ({"frames": 5}, (5, 128, 128)),
    "smooth": ({"amount": 2.0}, (16, 128, 128)),
    "smooth over time": ({"amount": 2.0}, (16, 128, 128)),
    "loop": ({"amount": 2.0}, (32, 128, 128)),
    "ping-pong": ({"amount": 2.0}, (60, 128, 128)),
    "crop": ({"width": 100, "height": 90, "left": 20, "top": 30}, (16, 90, 100)),
    "resize": ({"width": 64, "height": 32}, (16, 32, 64)),
    "flip horizontally": ({}, (16, 128, 128)),
    "flip vertically": ({}, (16, 128, 128)),
    "keep in mask": ({"mask": torch.ones(1, 16, 16)}, (16, 128, 128)),
}


def drawn(rig, **inputs):
    return rig.run("S2DMDrawFlow", motion=json.dumps(DRAWN), frames=16, **inputs)[0]


def test_every_edit(rig, node_classes):
    (operation,) = (
        socket
        for socket in node_classes["S2DMEditFlow"].GET_SCHEMA().inputs
        if socket.id == "operation"
    )
    assert operation.options == list(EDITS)
    flow = drawn(rig)
    for name, (inputs, shape) in EDITS.items():
        (edited,) = rig.run("S2DMEditFlow", flow=flow, operation=name, **inputs)
        assert (len(edited), edited.height, edited.width) == shape, name
        assert edited.displacement.any(), name


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"operation": "keep in mask"}, "expected a mask, got none"),
        ({"operation": "keep in mask", "mask": torch.ones(3, 8, 8)}, "mask: expected"),
        ({"operation": "crop", "width": 129}, "expected a part of the picture, 128x128, got 129"),
        ({"operation": "loop", "amount": 0.0}, "1 or more times"),
    ],
)
def test_edits_that_can_not_be(rig, inputs, message):
    with pytest.raises(ValueError, match=rf"^Edit Flow \(S2DM\): .*{message}"):
        rig.run("S2DMEditFlow", flow=drawn(rig), **inputs)


def test_flows_together(rig):
    flow = drawn(rig)
    (camera,) = rig.run("S2DMCameraFlow", frames=16, pan_x=10.0)
    (both,) = rig.run("S2DMCombineFlow", first=flow, second=camera)
    assert both.displacement[15, :, 64, 78].tolist() == pytest.approx([-38, 0], abs=1e-4)
    (after,) = rig.run("S2DMCombineFlow", first=flow, second=camera, how="one after the other")
    assert len(after) == 31
    mask = torch.ones(1, 8, 8)
    inside = {"first": flow, "second": camera, "how": "first in the mask"}
    (masked,) = rig.run("S2DMCombineFlow", **inside, mask=mask)
    assert torch.equal(masked.displacement, flow.displacement)
    with pytest.raises(ValueError, match=r"^Combine Flow \(S2DM\): expected a mask, got none"):
        rig.run("S2DMCombineFlow", **inside)


def test_some_frames(rig):
    flow = drawn(rig)
    (some,) = rig.run("S2DMPickFlow", flow=flow, first_frame=6, frames=3, every=5)
    assert [frame[0].min().item() for frame in some.displacement] == pytest.approx(
        [0, -16, -32, -48]
    )
    (tail,) = rig.run("S2DMPickFlow", flow=flow, first_frame=11, measured_from="the first picked")
    assert len(tail) == 6 and tail.displacement[5, 0, 64, 88] == pytest.approx(-16, abs=1e-3)
    with pytest.raises(ValueError, match=r"^Pick Flow \(S2DM\): .*up to 16.*got 17"):
        rig.run("S2DMPickFlow", flow=flow, first_frame=17)


def test_a_mask_is_moved(rig):
    mask = white_square()[..., 0]
    images, holes, masks, _ = rig.run("S2DMWarpImage", flow=drawn(rig), mask=mask[0])
    assert centre(masks[15]) == pytest.approx(88, abs=0.1)
    assert torch.equal(images[..., 0], masks) and holes[15].sum() == 600


@pytest.mark.parametrize("holes", ["fill", "stretch", "black"])
def test_holes(rig, holes):
    image = torch.full((1, 64, 64, 4), 0.5)
    image[:, 25:40, 15:25] = 1
    images, open_, *_ = rig.run("S2DMWarpImage", flow=drawn(rig), image=image, holes=holes)
    old = images[15, 27:38, 17:23, 0]
    assert open_[15, 27:38, 17:23].all()
    expected = {"fill": 0.5, "stretch": 1, "black": 0}[holes]
    assert old.mean() == pytest.approx(expected, abs=0.05)
    assert images[15, 27:38, 41:47].mean() == pytest.approx(1, abs=0.05)


def test_nothing_to_warp(rig):
    with pytest.raises(ValueError, match=r"^Warp Image \(S2DM\): .*got none"):
        rig.run("S2DMWarpImage", flow=drawn(rig))
    with pytest.raises(ValueError, match="a mask as large as the image, 64x64, got 8x8"):
        image, mask = torch.zeros(1, 64, 64, 3), torch.zeros(1, 8, 8)
        rig.run("S2DMWarpImage", flow=drawn(rig), image=image, mask=mask)


def test_a_latent_is_moved(rig):
    """A path of 48 pixels are 6 of its cells, whatever its number of channels."""
    (flow,) = rig.run("S2DMTracksToFlow", coordinates=PATH, frames=16, radius=16.0)
    samples = torch.zeros(2, 16, 16, 16)
    samples[0, :, 8, 5] = torch.arange(1.0, 17)
    latent = {"samples": samples, "noise_mask": torch.ones(2, 1, 16, 16), "batch_index": [3, 4]}
    *_, moved = rig.run("S2DMWarpImage", flow=flow, latent=latent, holes="black")
    assert set(moved) == {"samples"} and moved["samples"].shape == (16, 16, 16, 16)
    assert torch.equal(moved["samples"][0], samples[0])
    torch.testing.assert_close(
        moved["samples"][15, :, 8, 11], samples[0, :, 8, 5], rtol=0.2, atol=0
    )
    assert not moved["samples"][15, :, 8, 5].any()
    assert set(latent) == {"samples", "noise_mask", "batch_index"}


def test_a_latent_beside_an_image_and_one_of_a_picture_in_a_video_model(rig):
    image, latent = torch.rand(1, 64, 64, 3), {"samples": torch.rand(1, 16, 1, 8, 8)}
    images, _, _, moved = rig.run("S2DMWarpImage", flow=drawn(rig), image=image, latent=latent)
    assert images.shape == (16, 64, 64, 3) and moved["samples"].shape == (16, 16, 1, 8, 8)
    *_, nothing = rig.run("S2DMWarpImage", flow=drawn(rig), image=image)
    assert nothing is None
    with pytest.raises(ValueError, match=r"^Warp Image \(S2DM\): expected the latent of a picture"):
        rig.run("S2DMWarpImage", flow=drawn(rig), latent={"samples": torch.rand(1, 16, 5, 8, 8)})


@pytest.mark.parametrize("kind", ["npz", "flo", "kitti", "exr", "st_map"])
def test_files(rig, node_classes, kind):
    if kind in ("exr", "st_map"):
        pytest.importorskip("OpenEXR")
    flow = drawn(rig)
    name = f"flow/test_{kind}"
    (path,) = rig.run("S2DMSaveFlow", flow=flow, filename_prefix=name, format=kind)
    (second,) = rig.run("S2DMSaveFlow", flow=flow, filename_prefix=name, format=kind)
    assert path != second and Path(second).exists()
    offered = node_classes["S2DMLoadFlow"].GET_SCHEMA().inputs[0].options
    label = next(option for option in offered if Path(path).name in option)
    assert label == f"flow/{Path(path).name} [output]"
    (again,) = rig.run("S2DMLoadFlow", file=label)
    assert (again.displacement - flow.displacement).abs().max() < 0.01
    load = node_classes["S2DMLoadFlow"]
    before = load.fingerprint_inputs(file=label)
    assert before == load.fingerprint_inputs(file=label) and "missing" not in before


@pytest.mark.parametrize("file", ["gone.npz", "../outside.npz", "/etc/passwd", "x.npz [output]"])
def test_files_that_are_not_there(rig, node_classes, file):
    with pytest.raises(ValueError, match=r"^Load Flow \(S2DM\): expected a flow in the folder"):
        rig.run("S2DMLoadFlow", file=file)
    assert node_classes["S2DMLoadFlow"].fingerprint_inputs(file=file) == "missing"
