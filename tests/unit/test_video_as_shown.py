"""Clips are read as a screen shows them: upright, mirrored, with square pixels, in true colours."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from s2dm import video
from s2dm.video import colour, hdr, movie

av = pytest.importorskip("av")

# What is seen of a picture in each of the eight orientations, by its number in EXIF, with the
# display matrix (a, b, c, d) of ISO 14496-12 that says the same.
ORIENTATIONS = {
    1: ((1, 0, 0, 1), lambda p: p),
    2: ((-1, 0, 0, 1), lambda p: p.flip(-1)),
    3: ((-1, 0, 0, -1), lambda p: p.flip(-1, -2)),
    4: ((1, 0, 0, -1), lambda p: p.flip(-2)),
    5: ((0, 1, 1, 0), lambda p: p.transpose(-1, -2)),
    6: ((0, 1, -1, 0), lambda p: p.rot90(-1, (-2, -1))),
    7: ((0, -1, -1, 0), lambda p: p.transpose(-1, -2).flip(-1, -2)),
    8: ((0, -1, 1, 0), lambda p: p.rot90(1, (-2, -1))),
}
BARS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (128,) * 3, (255,) * 3, (0,) * 3)
BARS = np.array((*BARS, (220, 180, 40), (30, 180, 200)), np.float64)


def ramps(height: int = 32, width: int = 48) -> torch.Tensor:
    """Two frames that no orientation leaves as they are."""
    across = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    return torch.stack([across, down, across * down])[None].repeat(2, 1, 1, 1)


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Give an MP4 file another display matrix."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    numbers = [round(number * (1 << 16)) for number in (a, b, c, d)]
    content[start : start + 36] = struct.pack(
        ">9i", numbers[0], numbers[1], 0, numbers[2], numbers[3], 0, 7 << 16, 5 << 16, 1 << 30
    )
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("number", ORIENTATIONS)
def test_a_video_is_turned_and_mirrored(tmp_path, number):
    matrix, seen = ORIENTATIONS[number]
    path = video.write_clip(tmp_path / "c.mp4", ramps())
    before = video.read_clip(path)[0]
    after = video.read_clip(with_matrix(path, *matrix))[0]
    assert torch.equal(after, seen(before))
    assert torch.equal(torch.stack(list(video.iter_frames(path))), after)


@pytest.mark.parametrize("number", ORIENTATIONS)
@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp", "p.avif", "p.tif"])
def test_a_picture_is_turned_and_mirrored(tmp_path, number, name):
    exif = Image.Exif()
    exif[0x0112] = number
    picture = Image.fromarray(video.to_uint8(ramps()[0]))
    try:
        picture.save(tmp_path / name, exif=exif, quality=100)
    except (KeyError, ValueError, OSError) as error:
        pytest.skip(f"this Pillow writes no such file: {error}")
    got = video.read_image(tmp_path / name)
    assert (got - ORIENTATIONS[number][1](ramps()[0])).abs().mean() < 0.03
    assert torch.equal(video.read_clip(tmp_path / name)[0][0], got)


@pytest.mark.parametrize("scale", [0.25, 3])
def test_the_scale_of_a_display_matrix_is_no_turn(tmp_path, scale):
    path = video.write_clip(tmp_path / "c.mp4", ramps())
    before = video.read_clip(path)[0]
    assert torch.equal(video.read_clip(with_matrix(path, scale, 0, 0, scale))[0], before)


@pytest.mark.parametrize("degrees", [30, 45, 135])
def test_any_other_turn_is_refused(tmp_path, degrees):
    path = video.write_clip(tmp_path / "c.mp4", ramps())
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    with_matrix(path, cos, sin, -sin, cos)
    with pytest.raises(video.VideoError, match=rf"c\.mp4 .*{degrees} degrees"):
        video.read_clip(path)


def write(
    path: Path, planes, pixel_format: str, codec: str = "ffv1", rate: int = 8, **tags
) -> Path:
    """Three frames of these planes, lossless, with tags of the codec context."""
    height, width = planes[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for index in range(3):
            frame = av.VideoFrame(width, height, pixel_format)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
                rows[:, : values.shape[1]] = values
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("shape, width", [(Fraction(16, 9), 85), (Fraction(1, 2), 24), (1, 48)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_video_is_as_wide_as_it_is_shown(tmp_path, shape, width, turned):
    ramp = np.rint(255 * ramps()[0, 0].numpy()).astype(np.uint8)
    path = write(tmp_path / "c.mov", [ramp], "gray", "png", sample_aspect_ratio=shape)
    if turned:
        with_matrix(path, 0, 1, -1, 0)
    got = video.read_clip(path)[0]
    assert got.shape == (3, 3, *((width, 32) if turned else (32, width)))
    seen = got[0, 0, :, 16] if turned else got[0, 0, 16]
    assert torch.allclose(seen, torch.linspace(0, 1, width), atol=0.03)


def test_a_shape_of_pixels_that_cant_be_is_refused(tmp_path, monkeypatch):
    """It would take all memory. Damaged files have such; they can't be written with PyAV."""
    monkeypatch.setattr(movie, "_STRETCH", 2)
    grey = np.full((16, 48), 128, np.uint8)
    path = write(tmp_path / "c.mov", [grey], "gray", "png", sample_aspect_ratio=Fraction(3, 1))
    with pytest.raises(video.VideoError, match=r"c\.mov has pixels that are 3 times"):
        video.read_clip(path)


def ycbcr(rgb: np.ndarray, matrix: str, full: bool, bits: int = 8) -> list[np.ndarray]:
    """R'G'B' (H, W, 3) in [0, 1] as Y'CbCr of 4:4:4, by the definition."""
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}[matrix]
    luma = rgb @ np.array([kr, 1 - kr - kb, kb])
    chroma = [(rgb[..., i] - luma) / (2 - 2 * k) for i, k in ((2, kb), (0, kr))]
    step, dtype = 1 << (bits - 8), np.uint8 if bits == 8 else np.uint16
    scale, offset, chroma_scale = (
        ((256 * step - 1), 0, 256 * step - 1) if full else (219 * step, 16 * step, 224 * step)
    )
    planes = [luma * scale + offset, *(part * chroma_scale + 128 * step for part in chroma)]
    return [np.rint(plane).astype(dtype) for plane in planes]


def bars(height: int, width: int) -> np.ndarray:
    return np.repeat(BARS / 255, width // 8, axis=0)[None].repeat(height, 0)


def read_bars(path: Path) -> np.ndarray:
    frame = video.to_uint8(video.read_clip(path)[0][0])
    step = frame.shape[1] // 8
    return frame[frame.shape[0] // 2, step // 2 :: step].astype(float)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "size, tag, right",
    [
        ((64, 96), 1, "709"),
        ((64, 96), 6, "601"),
        ((64, 96), 5, "601"),
        ((64, 96), None, "601"),
        ((64, 1280), None, "709"),
        ((720, 96), None, "709"),
        ((720, 96), 6, "601"),
    ],
)
def test_colours_follow_the_tags_or_the_size(tmp_path, size, tag, right, full):
    tags = {} if tag is None else {"colorspace": tag}
    planes = ycbcr(bars(*size), right, full)
    path = write(tmp_path / "c.mkv", planes, "yuv444p", color_range=1 + full, **tags)
    assert np.abs(read_bars(path) - BARS).max() <= 3


def test_ten_bits_are_read_to_white(tmp_path):
    planes = ycbcr(bars(64, 96), "709", False, 10)
    path = write(tmp_path / "c.mkv", planes, "yuv444p10le", colorspace=1, color_range=1)
    assert np.abs(read_bars(path) - BARS).max() <= 1.5


BT709_TO_2020 = np.array(  # ITU-R BT.2087
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)


def srgb_to_light(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """Of light in cd/m²: the inverse EOTF of BT.2100."""
    power = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_signal(light: np.ndarray) -> np.ndarray:
    """Of scene light in [0, 1]: the OETF of BT.2100."""
    above = 0.17883277 * np.log(np.maximum(12 * light - 0.28466892, 1e-9)) + 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), above)


@pytest.mark.parametrize("primaries", [9, 2])
@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_hdr_has_the_colours_of_a_screen(tmp_path, transfer, primaries):
    """White at 203 cd/m², 75 % of HLG; today's other readers show it at 147 of 255."""
    light = srgb_to_light(bars(64, 96)) @ BT709_TO_2020.T
    signal = pq_signal(203 * light) if transfer == hdr.PQ else hlg_signal(0.26496 * light)
    path = write(
        *(tmp_path / "hdr.mkv", ycbcr(signal, "2020", False, 10), "yuv444p10le"),
        **{"color_trc": transfer, "color_primaries": primaries},
        **{"colorspace": 9, "color_range": 1},
    )
    got = read_bars(path)
    assert np.abs(got[4] - 247).max() <= 1  # white keeps a little room for what is brighter
    colours = [0, 1, 2, 3, 5, 6, 7]
    assert np.abs(got - BARS)[colours].max() <= 3


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_highlights_of_hdr_get_brighter_to_the_last(transfer):
    signal = np.arange(0, 1 << 16, 64, dtype=np.uint16)[None, :, None].repeat(3, 2)
    got = hdr.to_srgb(signal, 0xFFFF, transfer, 9).astype(int)[0]
    assert np.diff(got[:, 0]).min() >= 0
    assert np.ptp(got, axis=1).max() <= 1  # grey stays grey
    assert got[0, 0] == 0 and got[-1, 0] >= 253


def test_bright_colours_of_hdr_keep_their_hue():
    """Eight times as much light of the same orange."""
    light = srgb_to_light(np.array([220, 140, 60]) / 255)
    signal = np.rint(0xFFFF * pq_signal(203 * 8 * light)).astype(np.uint16)
    got = hdr.to_srgb(signal[None, None], 0xFFFF, hdr.PQ, 1)[0, 0] / 255
    assert got.max() > 0.98
    ratio = srgb_to_light(got) / light
    assert ratio.max() / ratio.min() == pytest.approx(1, abs=0.05)


def test_a_wide_gamut_without_hdr_is_brought_to_the_screens(tmp_path):
    light = srgb_to_light(bars(64, 96)) @ BT709_TO_2020.T
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    path = write(
        *(tmp_path / "wide.mkv", ycbcr(signal, "2020", False, 10), "yuv444p10le"),
        **{"color_trc": 14, "color_primaries": 9, "colorspace": 9, "color_range": 1},
    )
    assert np.abs(read_bars(path) - BARS).max() <= 3


@pytest.mark.parametrize(
    "tags, name",
    [
        ({"color_trc": 8}, "linear"),
        ({"color_trc": 9}, "logarithmic"),
        ({"color_trc": 17}, "SMPTE ST 428-1"),
        ({"colorspace": 8}, "YCgCo"),
        ({"colorspace": 14}, "ICtCp"),
    ],
)
def test_colours_that_cant_be_shown_are_refused_by_name(tmp_path, tags, name):
    path = write(tmp_path / "c.mkv", ycbcr(bars(64, 96), "709", False), "yuv444p", **tags)
    with pytest.raises(video.VideoError, match=rf"c\.mkv .*\({name}\)"):
        video.read_clip(path)


def test_dolby_vision_without_a_base_is_refused_by_name():
    context = SimpleNamespace(color_trc=2, color_primaries=2)
    stream = SimpleNamespace(codec_context=context)
    frame = SimpleNamespace(side_data={"DOVI_METADATA": b"..."})
    with pytest.raises(video.VideoError, match=r"phone\.mp4 .*Dolby Vision"):
        colour.ScreenColours(Path("phone.mp4"), stream, frame)
    context.color_trc = hdr.HLG  # what phones record has a base for other screens
    colour.ScreenColours(Path("phone.mp4"), stream, frame)


@pytest.mark.parametrize("size", [(480, 640), (720, 960), (480, 1280)])
@pytest.mark.parametrize("name", ["c.mp4", "c.mov", "c.mkv"])
def test_a_written_file_says_what_its_colours_are(tmp_path, size, name):
    frames = torch.from_numpy(bars(*size)).permute(2, 0, 1).float()[None].repeat(2, 1, 1, 1)
    path = video.write_clip(tmp_path / name, frames)
    hd = max(size[0] / 720, size[1] / 1280) >= 1
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc) == (1, 1)
        assert (context.colorspace, context.color_range) == (1 if hd else 6, 1)
        planes = [np.frombuffer(p, np.uint8).reshape(-1, p.line_size) for p in frame.planes]
    right = ycbcr(bars(*size), "709" if hd else "601", False)
    for plane, expected, scale in zip(planes, right, (1, 2, 2), strict=True):
        step = size[1] // 8
        columns = np.arange(step // 2, size[1], step)
        got = plane[size[0] // 2 // scale, columns // scale].astype(int)
        assert np.abs(got - expected[0, columns]).max() <= 1
    assert np.abs(read_bars(path) - BARS).max() <= 3


def test_the_size_of_a_video_may_change_on_the_way(tmp_path):
    """As recordings of calls do: each frame is converted at its own size."""
    content = b""
    for index, side in enumerate((64, 32)):
        grey = np.full((side, side), 100 + 50 * index, np.uint8)
        chroma = np.full((side // 2, side // 2), 128, np.uint8)
        planes = [grey, chroma, chroma]
        part = write(tmp_path / "part.mpg", planes, "yuv420p", "mpeg1video", rate=25)
        content += part.read_bytes()
    (tmp_path / "c.mpg").write_bytes(content)
    frames, _ = video.read_clip(tmp_path / "c.mpg", size=(8, 8))
    shown = frames[[0, -1], 0, 4, 4] * 255
    assert torch.allclose(shown, (torch.tensor([100.0, 150.0]) - 16) * 255 / 219, atol=3)
    with pytest.raises(video.VideoError, match="64x64, then 32x32"):
        video.read_clip(tmp_path / "c.mpg")


def test_the_picture_on_the_cover_is_not_the_clip():
    from av.stream import Disposition

    cover, clip = (SimpleNamespace(disposition=Disposition(number)) for number in (1 << 10, 1))
    assert movie.main_stream([cover, clip]) is clip
    assert movie.main_stream([clip, cover]) is clip
    assert movie.main_stream([cover]) is cover
