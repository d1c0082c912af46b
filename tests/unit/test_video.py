"""Clips in and out of files, and contact sheets."""

from __future__ import annotations

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s2dm import video
from s2dm.video import mp4

av = pytest.importorskip("av")


@pytest.fixture
def clip() -> torch.Tensor:
    """A red square that moves to the right over a still, coloured ramp: (12, 3, 48, 64)."""
    across = torch.linspace(0, 1, 64).expand(48, 64)
    down = torch.linspace(0, 1, 48)[:, None].expand(48, 64)
    frames = torch.stack([across, down, torch.full((48, 64), 0.4)]).repeat(12, 1, 1, 1)
    for i in range(12):
        frames[i, :, 16:28, 4 * i : 4 * i + 12] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return frames


def test_importing_it_loads_no_codec():
    code = "import sys, s2dm.video; print(*{'av', 'PIL', 'cv2'} & set(sys.modules))"
    root = Path(video.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("name, tolerance", [("c.mp4", 4), ("c.gif", 5), ("c", 0.51)])
def test_written_clip_reads_back(tmp_path, clip, name, tolerance):
    path = video.write_clip(tmp_path / name, clip, fps=10)
    again, fps = video.read_clip(path)
    assert again.shape == clip.shape
    assert again.dtype == torch.float32
    assert (again - clip).abs().mean() * 255 < tolerance
    if path.suffix:
        assert fps == pytest.approx(10)


def test_frames_stream_from_a_generator(tmp_path, clip):
    """The writer asks for a frame only when it has dealt with those before."""
    alive: list[int] = []

    def frames():
        for index, frame in enumerate(clip.repeat(30, 1, 1, 1)):
            alive.append(index)
            yield frame

    source = frames()
    video.write_clip(tmp_path / "long.mp4", source)
    assert len(alive) == 360
    assert sum(1 for _ in video.iter_frames(tmp_path / "long.mp4")) == 360


def test_reader_streams(tmp_path, clip):
    video.write_clip(tmp_path / "c.mp4", clip)
    first = next(video.iter_frames(tmp_path / "c.mp4"))
    assert first.shape == (3, 48, 64)


def test_still_pixels_stay_still_in_a_gif(tmp_path, clip):
    video.write_clip(tmp_path / "c.gif", clip)
    again, _ = video.read_clip(tmp_path / "c.gif")
    assert again[:, :, 32:].std(dim=0).max() == 0


def test_odd_sizes_are_padded_for_h264(tmp_path, clip):
    path = video.write_clip(tmp_path / "odd.mp4", clip[:, :, :47, :63])
    again, _ = video.read_clip(path)
    assert again.shape == (12, 3, 48, 64)
    assert (again[..., :47, :63] - clip[..., :47, :63]).abs().mean() * 255 < 4


def test_falls_back_without_libx264(tmp_path, clip, monkeypatch, caplog):
    monkeypatch.setattr(mp4, "CODECS", (("not-there", {}), *mp4.CODECS[2:]))
    path = video.write_clip(tmp_path / "c.mp4", clip)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert "mpeg4" in caplog.text
    assert (video.read_clip(path)[0] - clip).abs().mean() * 255 < 5


def test_no_codec_at_all_says_what_to_do(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(mp4, "CODECS", (("not-there", {}),))
    with pytest.raises(video.VideoError, match=r"Write a \.gif"):
        video.write_clip(tmp_path / "c.mp4", clip)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [1, 5, 12, 20])
def test_reader_spreads_frames_over_the_clip(tmp_path, clip, frames):
    video.write_clip(tmp_path / "c", clip)
    got, _ = video.read_clip(tmp_path / "c", frames=frames)
    assert got.shape[0] == frames
    assert torch.allclose(got[0], clip[0], atol=0.003)
    if frames > 1:
        assert torch.allclose(got[-1], clip[-1], atol=0.003)


def test_thinned_clip_keeps_its_duration(tmp_path, clip):
    video.write_clip(tmp_path / "c.mp4", clip, fps=12)
    got, fps = video.read_clip(tmp_path / "c.mp4", frames=6)
    assert got.shape[0] / fps == pytest.approx(1.0)


def test_size_covers_and_crops(tmp_path, clip):
    video.write_clip(tmp_path / "c", clip)
    got, _ = video.read_clip(tmp_path / "c", size=(32, 32))
    assert got.shape == (12, 3, 32, 32)
    # The middle of the ramp stays in the middle: nothing is squeezed.
    assert got[0, 0, 2].mean() == pytest.approx(0.5, abs=0.02)
    assert got[0, 0, 2, 0] == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize("name", ["c.mp4", "c.gif", "c"])
def test_a_broken_run_leaves_the_old_file(tmp_path, clip, name):
    path = video.write_clip(tmp_path / name, clip)
    before = sorted(p.name for p in tmp_path.iterdir())
    kept = path.read_bytes() if path.is_file() else len(list(path.iterdir()))

    def breaks():
        yield from clip[:3]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        video.write_clip(path, breaks())
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (path.read_bytes() if path.is_file() else len(list(path.iterdir()))) == kept


def test_a_folder_of_frames_is_replaced_but_nothing_else(tmp_path, clip):
    folder = video.write_clip(tmp_path / "c", clip)
    video.write_clip(folder, clip[:3])
    assert len(list(folder.iterdir())) == 3
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(video.VideoError, match=r"notes\.txt"):
        video.write_clip(folder, clip[:3])
    assert (folder / "notes.txt").exists()


def test_an_image_is_read_as_a_frame_is(tmp_path, clip):
    video.write_clip(tmp_path / "c", clip[3:4])
    got = video.read_image(tmp_path / "c" / "frame_00001.png")
    assert torch.equal(got, video.read_clip(tmp_path / "c")[0][0])
    with pytest.raises(video.VideoError, match="There is no image at"):
        video.read_image(tmp_path / "c")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(video.VideoError, match=r"text\.png is not an image"):
        video.read_image(tmp_path / "text.png")


def test_a_photo_is_read_upright(tmp_path):
    """However the camera was held, as core's Load Image reads it."""
    photo = Image.new("RGB", (40, 20), "blue")
    photo.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    got = video.read_image(tmp_path / "photo.png")
    assert got.shape == (3, 40, 20)
    assert got[0, :20].min() == 1 and got[2, 20:].min() == 1


def test_a_video_is_read_upright(tmp_path, clip):
    """Phones film lying and write down how far to turn it."""
    path = video.write_clip(tmp_path / "phone.mp4", clip)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert content[matrix : matrix + 36] == plain
    before = video.read_clip(path)[0]
    content[matrix : matrix + 36] = quarter
    path.write_bytes(content)
    assert torch.equal(video.read_clip(path)[0], before.rot90(-1, (2, 3)))
    assert torch.equal(torch.stack(list(video.iter_frames(path))), before.rot90(-1, (2, 3)))


def test_frames_are_spread_in_time(tmp_path):
    """Of a camera whose frames are not evenly apart: half a second, then two seconds."""
    times = [*range(0, 500, 50), *range(500, 2501, 200)]
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "bf": "0"})
        stream.width = stream.height = 32
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for time in times:
            grey = np.full((32, 32, 3), time // 10, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, fps = video.read_clip(tmp_path / "uneven.mkv", frames=6)
    shown = frames.mean((1, 2, 3)) * 2550
    assert torch.allclose(shown, torch.tensor([0.0, 500, 900, 1500, 2100, 2500]), atol=30)
    assert 6 / fps == pytest.approx(2.5 * len(times) / (len(times) - 1), rel=0.01)


def test_numbers_of_frames_count_by_their_value(tmp_path, clip):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"frame{number}.png")
    (folder / "._frame1.png").write_bytes(b"what macOS leaves on foreign disks")
    frames, _ = video.read_clip(folder)
    assert torch.allclose(frames[:, 0].mean((1, 2)) * 255, 20.0 * torch.arange(12))


def test_a_picture_as_a_clip_stands_still(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    frames, fps = video.read_clip(tmp_path / "picture.png", frames=16)
    assert frames.shape == (16, 3, 8, 8)
    assert fps == video.DEFAULT_FPS


def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    got = video.read_image(tmp_path / "grey.png")
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535)
    assert torch.allclose(got, expected.expand(3, -1, -1), atol=1 / 255)


@pytest.mark.parametrize("name", ["slow.gif", "slow.mp4"])
def test_a_frame_may_last_for_minutes(tmp_path, clip, name):
    path = video.write_clip(tmp_path / name, clip[:2], fps=1e-4)
    frames, fps = video.read_clip(path)
    assert len(frames) == 2
    assert fps < 0.02


@pytest.mark.skipif(sys.platform == "win32", reason="whole paths are short there")
def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path, clip):
    for name in ("n" * 250, "n" * 250 + ".mkv"):
        assert len(video.read_clip(video.write_clip(tmp_path / name, clip))[0]) == len(clip)


def test_reading_errors_are_clear(tmp_path, clip):
    with pytest.raises(video.VideoError, match="There is no clip"):
        video.read_clip(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(video.VideoError, match="not a video"):
        video.read_clip(tmp_path / "text.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(video.VideoError, match="no frames"):
        video.read_clip(tmp_path / "empty")
    (tmp_path / "mixed").mkdir()
    video.write_clip(tmp_path / "one", clip[:1])
    video.write_clip(tmp_path / "two", clip[:1, :, :40])
    (tmp_path / "one" / "frame_00001.png").rename(tmp_path / "mixed" / "1.png")
    (tmp_path / "two" / "frame_00001.png").rename(tmp_path / "mixed" / "2.png")
    with pytest.raises(video.VideoError, match="64x48, then 64x40"):
        video.read_clip(tmp_path / "mixed")
    assert video.read_clip(tmp_path / "mixed", size=(32, 32))[0].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="frames=0"):
        video.read_clip(tmp_path / "one", frames=0)


def test_writing_errors_are_clear(tmp_path, clip):
    with pytest.raises(video.VideoError, match=r"\.jpg"):
        video.write_clip(tmp_path / "c.jpg", clip)
    with pytest.raises(video.VideoError, match="no frames"):
        video.write_clip(tmp_path / "c.mp4", [])
    with pytest.raises(video.VideoError, match=r"\(3, H, W\) tensor, got \(48, 64, 3\)"):
        video.write_clip(tmp_path / "c.mp4", clip.permute(0, 2, 3, 1))
    with pytest.raises(video.VideoError, match="one size"):
        video.write_clip(tmp_path / "c.gif", [clip[0], clip[1, :, :40]])
    with pytest.raises(video.VideoError, match="frame rate"):
        video.write_clip(tmp_path / "c.mp4", clip, fps=0)
    assert list(tmp_path.iterdir()) == []


def test_uint8_rounds_to_the_nearest():
    frame = torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0, -1.0]).expand(3, 1, 6)
    assert video.to_uint8(frame)[0, :, 0].tolist() == [0, 0, 1, 255, 255, 0]


def test_contact_sheet_shows_every_frame(clip):
    sheet = np.array(video.contact_sheet([clip, clip[:4] * 0]))
    assert sheet.shape == (2 * 50 + 2, len(clip) * 66 + 2, 3)
    for number, frame in enumerate(clip):
        left = 2 + number * 66
        assert np.abs(sheet[2:50, left : left + 64].astype(int) - video.to_uint8(frame)).max() == 0
    assert sheet[52:100, 2 + 3 * 66 : 66 + 3 * 66].max() == 0
    assert sheet[52:100, 2 + 4 * 66 :].min() == 255  # the second clip has only four frames


def test_contact_sheet_breaks_a_long_clip_into_lines(clip):
    """Left out were the very frames in which a bundled workflow lost an eye."""
    columns = len(clip) - 2
    sheet = np.array(video.contact_sheet([clip, clip[:1]], ["long", "short"], columns))
    margin = sheet.shape[1] - columns * 66 - 2
    assert sheet.shape[0] == 3 * 50 + 2
    for number, frame in enumerate(clip):
        line, column = divmod(number, columns)
        top, left = 2 + line * 50, margin + 2 + column * 66
        cell = sheet[top : top + 48, left : left + 64].astype(int)
        assert np.abs(cell - video.to_uint8(frame)).max() == 0
    titles = [sheet[2 + line * 50 : 50 + line * 50, :margin].min() < 128 for line in range(3)]
    assert titles == [True, False, True]  # a title stands where its clip begins
    with pytest.raises(ValueError, match="at least one column"):
        video.contact_sheet([clip], columns=0)


def test_contact_sheet_labels_and_errors(tmp_path, clip):
    path = video.write_contact_sheet(tmp_path / "s" / "sheet.png", [clip], ["true " * 20], 3)
    assert path.exists()
    with pytest.raises(ValueError, match="1 labels"):
        video.contact_sheet([clip], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        video.contact_sheet([])
    with pytest.raises(ValueError, match="Row 1"):
        video.contact_sheet([clip[0]])
