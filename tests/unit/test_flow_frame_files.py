"""Folders of flow: round trips, and what known readers and writers make of the files."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import torch

from s2dm.flow import FlowError, FlowField, load_flow, save_flow

exr = pytest.mark.skipif(find_spec("OpenEXR") is None, reason="OpenEXR is not installed")
PRECISION = {"flo": 0, "kitti": 1 / 128, "exr": 0, "st_map": 2e-5}
FORMATS = [
    pytest.param("flo"),
    pytest.param("kitti"),
    pytest.param("exr", marks=exr),
    pytest.param("st_map", marks=exr),
]


@pytest.fixture
def field() -> FlowField:
    generator = torch.Generator().manual_seed(0)
    displacement = torch.randn(3, 2, 12, 20, generator=generator) * 20
    occlusion = (torch.rand(3, 1, 12, 20, generator=generator) > 0.8).float()
    displacement[0] = occlusion[0] = 0
    return FlowField(displacement, occlusion)


@pytest.mark.parametrize("layout", FORMATS)
def test_folders_keep_a_field(tmp_path, field, layout):
    folder = tmp_path / "clip"
    save_flow(folder, field, layout=layout)
    assert len(list(folder.iterdir())) == 3
    again = load_flow(folder)
    error = (again.displacement - field.displacement).abs().max()
    assert error <= PRECISION[layout]
    kept = torch.zeros_like(field.occlusion) if layout == "flo" else field.occlusion
    assert torch.equal(again.occlusion, kept)
    # A clip replaces its folder, and no other.
    save_flow(folder, field.select([0, 1]), layout=layout)
    assert len(load_flow(folder)) == 2
    with pytest.raises(FlowError, match=r"holds other files than|layout: expected one of"):
        save_flow(folder, field, layout="st" if layout == "flo" else "flo")


def test_opencv_reads_flo_as_we_do(tmp_path, field):
    save_flow(tmp_path / "clip", field)
    read = cv2.readOpticalFlow(str(tmp_path / "clip" / "00002.flo"))
    assert np.array_equal(read.transpose(2, 0, 1), field.displacement[1].numpy())
    cv2.writeOpticalFlow(str(tmp_path / "one.flo"), read)
    assert torch.equal(load_flow(tmp_path / "one.flo").displacement, field.displacement[:2])


def test_torchvision_reads_kitti_as_we_do(tmp_path, field):
    from torchvision.datasets import _optical_flow

    save_flow(tmp_path / "clip", field, layout="kitti")
    flow, valid = _optical_flow._read_16bits_png_with_flow_and_valid_mask(
        str(tmp_path / "clip" / "00002.png")
    )
    assert np.abs(np.asarray(flow) - field.displacement[1].numpy()).max() <= 1 / 128
    assert np.array_equal(np.asarray(valid), field.occlusion[1, 0].numpy() == 0)


def test_kitti_holds_512_pixels(tmp_path, field):
    with pytest.raises(FlowError, match=r"up to 512 pixels, got 600.*another format"):
        save_flow(
            tmp_path / "clip",
            FlowField(field.displacement.sign() * 600, field.occlusion),
            layout="kitti",
        )
    assert not (tmp_path / "clip").exists()


def test_what_kitti_does_not_know_is_occluded(tmp_path):
    image = np.zeros((4, 5, 3), np.uint16)
    image[1, 2] = (1, 2**15 - 64, 2**15 + 128)
    still = np.full((4, 5, 3), 2**15, np.uint16)
    still[..., 0] = 1
    cv2.imwrite(str(tmp_path / "000000.png"), still)
    cv2.imwrite(str(tmp_path / "000001.png"), image)
    flow = load_flow(tmp_path)
    assert flow.displacement[1, :, 1, 2].tolist() == [2, -1]
    assert flow.displacement[1].abs().sum() == 3 and flow.occlusion[1].sum() == 19


@exr
def test_exr_files_are_what_compositors_read(tmp_path, field):
    import OpenEXR

    save_flow(tmp_path / "vectors", field, layout="exr")
    file = OpenEXR.File(str(tmp_path / "vectors" / "00002.exr"), separate_channels=True)
    channels = {name: channel.pixels for name, channel in file.channels().items()}
    x, y = field.displacement[1].numpy()
    assert np.array_equal(channels["backward.u"], x)
    assert np.array_equal(channels["backward.v"], -y)  # upwards
    assert np.array_equal(channels["A"], 1 - field.occlusion[1, 0].numpy())

    save_flow(tmp_path / "map", field, layout="st_map")
    file = OpenEXR.File(str(tmp_path / "map" / "00001.exr"), separate_channels=True)
    red, green = (file.channels()[name].pixels for name in "RG")
    assert red[0, 0] == pytest.approx(0.5 / 20) and red[0, -1] == pytest.approx(19.5 / 20)
    assert green[0, 0] == pytest.approx(1 - 0.5 / 12) and green[-1, 0] == pytest.approx(0.5 / 12)


@exr
def test_vectors_between_neighbours(tmp_path):
    """A pan as a renderer writes it: every frame with vectors to the one before and the next."""
    import OpenEXR

    plain = np.zeros((6, 8), np.float32)
    for number in range(3):
        channels = {
            "forward.u": plain + 2,
            "forward.v": plain,
            "backward.u": plain - 2,
            "backward.v": plain,
        }
        OpenEXR.File({}, channels).write(str(tmp_path / f"{number}.exr"))
    with pytest.raises(FlowError, match=r"flow between neighbouring frames.*previous frame"):
        load_flow(tmp_path)
    for measured_to in ("previous frame", "next frame"):
        flow = load_flow(tmp_path, measured_to)
        assert [round(frame[0, 3, 7].item(), 3) for frame in flow.displacement] == [0, -2, -4, -6]


@exr
@pytest.mark.parametrize(
    ("names", "measured_to", "message"),
    [
        (("Y",), "frame 1", r"expected motion vectors, backward\.u .* got the channels Y"),
        (("forward.u", "forward.v"), "frame 1", r"expected backward\.u .*got forward vectors only"),
    ],
)
def test_other_channels_are_named(tmp_path, names, measured_to, message):
    import OpenEXR

    data = {name: np.zeros((2, 3), np.float32) for name in names}
    OpenEXR.File({}, data).write(str(tmp_path / "a.exr"))
    with pytest.raises(FlowError, match=message):
        load_flow(tmp_path, measured_to)


@exr
@pytest.mark.parametrize("content", [b"", b"\x76\x2f\x31\x01 nothing that follows", b"JPEG" * 99])
def test_broken_exr_files(tmp_path, content):
    (tmp_path / "a.exr").write_bytes(content)
    with pytest.raises(FlowError, match=r"a\.exr: truncated, or no OpenEXR file"):
        load_flow(tmp_path / "a.exr")


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG", cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()]
)
def test_pictures_that_are_no_flow(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(FlowError, match=r"a\.png: expected KITTI's flow, a PNG of three times 16"):
        load_flow(tmp_path)


def test_mixed_folders(tmp_path, field):
    save_flow(tmp_path / "clip", field)
    (tmp_path / "clip" / "preview.png").write_bytes(b"")
    with pytest.raises(FlowError, match=r"files of one kind, got \.flo and \.png"):
        load_flow(tmp_path / "clip")
    with pytest.raises(FlowError, match="measured_to: expected one of frame 1"):
        load_flow(tmp_path / "clip", "frame 2")


@pytest.mark.parametrize("layout", ["exr", "st_map"])
def test_a_missing_openexr_is_named(tmp_path, field, layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(FlowError, match=r"need the package OpenEXR.*pip install OpenEXR"):
        save_flow(tmp_path / "clip", field, layout=layout)
    assert not (tmp_path / "clip").exists()
