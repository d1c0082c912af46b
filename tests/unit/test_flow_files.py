"""Flow on disk: round trips, and every wrong file says what is wrong with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField, load_flow, save_flow


def random_field(frames: int = 3, height: int = 6, width: int = 7, seed: int = 0) -> FlowField:
    generator = torch.Generator().manual_seed(seed)
    displacement = torch.randn(frames, 2, height, width, generator=generator) * 9
    occlusion = torch.rand(frames, 1, height, width, generator=generator).round()
    displacement[0] = occlusion[0] = 0
    return FlowField(displacement, occlusion)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_npz_keeps_the_field(tmp_path_factory, frames, height, width, seed):
    field = random_field(frames, height, width, seed)
    path = tmp_path_factory.mktemp("npz") / "clip.npz"
    save_flow(path, field)
    back = load_flow(path)
    assert torch.equal(back.displacement, field.displacement)
    assert torch.equal(back.occlusion, field.occlusion)


def test_half_precision_is_near_and_smaller(tmp_path):
    field = random_field(4, 32, 32)
    save_flow(tmp_path / "full.npz", field)
    save_flow(tmp_path / "half.npz", field, precision="float16")
    back = load_flow(tmp_path / "half.npz")
    torch.testing.assert_close(back.displacement, field.displacement, rtol=1 / 1024, atol=1e-4)
    assert back.displacement.dtype == torch.float32
    full, half = ((tmp_path / f"{name}.npz").stat().st_size for name in ("full", "half"))
    assert half < 0.7 * full


def test_half_precision_refuses_what_it_cannot_hold(tmp_path):
    field = random_field().scale(1e5)
    with pytest.raises(FlowError, match="float32"):
        save_flow(tmp_path / "clip.npz", field, precision="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_flo_files_keeps_the_displacement(tmp_path):
    field = random_field()
    save_flow(tmp_path / "clip", field)
    assert [file.name for file in sorted((tmp_path / "clip").iterdir())] == [
        "00001.flo", "00002.flo", "00003.flo",
    ]  # fmt: skip
    back = load_flow(tmp_path / "clip")
    assert torch.equal(back.displacement, field.displacement)
    assert not back.occlusion.any()


def test_saving_a_shorter_clip_into_the_folder_leaves_no_old_frames(tmp_path):
    save_flow(tmp_path / "clip", random_field(5))
    save_flow(tmp_path / "clip", random_field(2))
    assert len(load_flow(tmp_path / "clip")) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FlowError, match="other files"):
        save_flow(tmp_path, random_field())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_flo_file_is_the_second_of_two_frames(tmp_path):
    field = random_field(2)
    save_flow(tmp_path / "pair.flo", field)
    assert torch.equal(load_flow(tmp_path / "pair.flo").displacement, field.displacement)
    with pytest.raises(FlowError, match="field of 3 frames"):
        save_flow(tmp_path / "clip.flo", random_field(3))


def test_flo_bytes_are_as_middlebury_has_them(tmp_path):
    displacement = torch.zeros(2, 2, 1, 2)
    displacement[1, :, 0, 1] = torch.tensor([3.0, -4.0])
    save_flow(tmp_path / "a.flo", FlowField(displacement, torch.zeros(2, 1, 1, 2)))
    data = (tmp_path / "a.flo").read_bytes()
    assert np.frombuffer(data[:4], "<f4") == 202021.25
    assert np.frombuffer(data[4:12], "<i4").tolist() == [2, 1]
    assert np.frombuffer(data[12:], "<f4").tolist() == [0, 0, 3, -4]


def test_unknown_flow_becomes_occlusion(tmp_path):
    flow = np.full((2, 3, 2), 1e10, dtype="<f4")
    flow[0] = 1
    header = b"PIEH" + np.array([3, 2], "<i4").tobytes()
    (tmp_path / "a.flo").write_bytes(header + flow.tobytes())
    field = load_flow(tmp_path / "a.flo")
    assert field.occlusion[1, 0].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert not field.displacement[1, :, 1].any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.flo", b"JPEG", "PIEH"),
        ("a.flo", b"", "PIEH"),
        ("a.flo", b"PIEH\x01\x00", "no valid size"),
        ("a.flo", b"PIEH" + np.array([-1, 4], "<i4").tobytes(), "no valid size"),
        ("a.flo", b"PIEH" + np.array([2**30, 2**30], "<i4").tobytes(), "truncated"),
        ("a.flo", b"PIEH" + np.array([1, 1], "<i4").tobytes() + bytes(9), "appended"),
        (
            "a.flo",
            b"PIEH" + np.array([1, 1], "<i4").tobytes() + np.array([np.nan, 0], "<f4").tobytes(),
            "NaN",
        ),
        ("a.npz", b"", "truncated, or no .npz"),
        ("a.npz", b"PK\x03\x04 nothing that follows", "truncated, or no .npz"),
        ("a.npz", b"\x80\x04pickle", "truncated, or no .npz"),
        ("a.png", b"", "KITTI"),
        ("a.jpg", b"", "ends in .jpg"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlowError, match=message) as error:
        load_flow(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"flow": np.zeros(3)}, "got flow"),
        (
            {"displacement": np.zeros((2, 2, 4, 4)), "occlusion": np.zeros((2, 1, 4, 5))},
            "to match the displacement",
        ),
        (
            {"displacement": np.full((2, 2, 4, 4), np.nan), "occlusion": np.zeros((2, 1, 4, 4))},
            "NaN",
        ),
        (
            {"displacement": np.array([{}], object), "occlusion": np.zeros((2, 1, 4, 4))},
            "floating point",
        ),
        (
            {"displacement": np.array(["a"]), "occlusion": np.zeros((2, 1, 4, 4))},
            "must be floating point",
        ),
    ],
)
def test_wrong_arrays_say_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FlowError, match=message):
        load_flow(tmp_path / "a.npz")


def test_a_truncated_npz_is_refused_wherever_it_ends(tmp_path):
    save_flow(tmp_path / "whole.npz", random_field())
    data = (tmp_path / "whole.npz").read_bytes()
    for end in range(0, len(data), max(1, len(data) // 17)):
        (tmp_path / "part.npz").write_bytes(data[:end])
        with pytest.raises(FlowError):
            load_flow(tmp_path / "part.npz")


def test_frames_of_different_sizes_are_refused(tmp_path):
    save_flow(tmp_path / "clip", random_field(2, 4, 4))
    save_flow(tmp_path / "other.flo", random_field(2, 5, 4))
    (tmp_path / "other.flo").rename(tmp_path / "clip" / "00003.flo")
    with pytest.raises(FlowError, match="4x4, 4x5"):
        load_flow(tmp_path / "clip")


def test_missing_and_empty_places_are_named(tmp_path):
    with pytest.raises(FlowError, match="no such file"):
        load_flow(tmp_path / "clip.npz")
    with pytest.raises(FlowError, match="holds no"):
        load_flow(tmp_path)


def test_numbers_of_flo_files_count_by_their_value(tmp_path):
    field = random_field(12)
    save_flow(tmp_path / "clip", field)
    for number in range(1, 13):
        (tmp_path / "clip" / f"{number:05d}.flo").rename(tmp_path / "clip" / f"{number}.flo")
    assert torch.equal(load_flow(tmp_path / "clip").displacement, field.displacement)


@pytest.mark.parametrize("ending", [".NPZ", ".Flo"])
def test_endings_may_be_written_large(tmp_path, ending):
    field = random_field(2)
    save_flow(tmp_path / f"clip{ending}", field)
    assert (tmp_path / f"clip{ending}").is_file()
    assert torch.equal(load_flow(tmp_path / f"clip{ending}").displacement, field.displacement)
