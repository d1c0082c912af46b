"""Animated pictures are clips: what ComfyUI's SaveAnimatedWEBP and SaveAnimatedPNG write, too."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from s2dm import video
from s2dm.data.videos import VideoClips
from s2dm.video import formats

pytest.importorskip("av")

LOSSLESS = {"wave.webp": {"lossless": True}, "wave.png": {}, "wave.apng": {"format": "PNG"}}
needs_avif = pytest.mark.skipif(
    not features.check("avif"), reason="this Pillow neither reads nor writes AVIF"
)
ANIMATIONS = [*LOSSLESS, "wave.gif", pytest.param("wave.avif", marks=needs_avif)]


def pictures(count: int = 6, side: int = 32) -> list[Image.Image]:
    """Greys of their own that get brighter."""
    return [Image.new("RGB", (side, side), (30 + 40 * i, 90, 60)) for i in range(count)]


def save(path: Path, durations: int | list[int], count: int = 6) -> Path:
    first, *others = pictures(count)
    options = {"quality": 90, **LOSSLESS.get(path.name, {})}
    first.save(path, save_all=True, append_images=others, duration=durations, **options)
    return path


@pytest.mark.parametrize("name", ANIMATIONS)
def test_an_animation_is_a_clip_at_its_rate(tmp_path, name):
    path = save(tmp_path / name, 120)
    frames, fps = video.read_clip(path)
    assert fps == pytest.approx(1000 / 120)
    assert frames.shape == (6, 3, 32, 32)
    shown = frames[:, 0].mean((1, 2)) * 255
    assert torch.allclose(shown, 30.0 + 40 * torch.arange(6), atol=3)
    assert torch.equal(torch.stack(list(video.iter_frames(path))), frames)
    assert torch.equal(video.read_image(path), frames[0])


@pytest.mark.parametrize("name", ANIMATIONS)
def test_frames_are_spread_over_its_time(tmp_path, name):
    """Of six frames the fourth is shown for two seconds."""
    path = save(tmp_path / name, [100, 100, 100, 2000, 100, 100])
    frames, fps = video.read_clip(path, frames=3)
    shown = frames[:, 0].mean((1, 2)) * 255
    assert torch.allclose(shown, torch.tensor([30.0, 150.0, 230.0]), atol=3)
    assert 3 / fps == pytest.approx(2.4 * 6 / 5, rel=0.01)
    assert video.frame_rate(path) == pytest.approx(6 / 2.5)


def test_frames_that_ask_for_no_time_have_that_of_browsers(tmp_path):
    path = save(tmp_path / "wave.gif", 0)
    assert video.frame_rate(path) == pytest.approx(10)


def test_the_picture_for_readers_without_animation_is_no_frame(tmp_path):
    first, *others = pictures()
    path = tmp_path / "wave.png"
    first.save(path, save_all=True, append_images=others, default_image=True, duration=100)
    frames, fps = video.read_clip(path)
    assert len(frames) == 5 and fps == pytest.approx(10)
    assert frames[0, 0, 0, 0] * 255 == pytest.approx(70)


def test_what_a_file_holds_counts_not_its_ending(tmp_path):
    path = save(tmp_path / "wave.webp", 100)
    shutil.copy(path, tmp_path / "download.mp4")
    assert torch.equal(video.read_clip(tmp_path / "download.mp4")[0], video.read_clip(path)[0])


def test_a_photo_of_two_pictures_stands_still(tmp_path):
    """Phones put a second picture into their JPEGs (MPO)."""
    first, second, *_ = pictures()
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "photo.jpg") as image:
        assert image.n_frames == 2
    assert len(video.read_clip(tmp_path / "photo.jpg")[0]) == 1


def test_pages_are_no_frames(tmp_path):
    save(tmp_path / "scan.tif", 0, count=3)
    for read in (video.read_clip, video.read_image):
        with pytest.raises(video.VideoError, match=r"scan\.tif holds 3 pages"):
            read(tmp_path / "scan.tif")
    pictures()[1].save(tmp_path / "one.tif")
    assert video.read_clip(tmp_path / "one.tif")[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
@pytest.mark.parametrize("suffix", [".png", pytest.param(".avif", marks=needs_avif)])
def test_pictures_of_high_dynamic_range_are_refused_by_name(tmp_path, suffix, transfer, name):
    path = tmp_path / f"hdr{suffix}"
    tags = PngImagePlugin.PngInfo()
    tags.add(b"cICP", bytes([9, transfer, 0, 1]))
    pictures()[0].save(path, **({"pnginfo": tags} if suffix == ".png" else {}))
    if suffix == ".avif":
        content = bytearray(path.read_bytes())
        place = content.index(b"colrnclx") + 10
        content[place : place + 2] = struct.pack(">H", transfer)
        path.write_bytes(content)
    for read in (video.read_image, video.read_clip):
        with pytest.raises(video.VideoError, match=rf"hdr\{suffix} .*\({name}\)"):
            read(path)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avis"])
def test_photos_that_pillow_cant_read_are_refused_by_name(tmp_path, brand):
    """FFmpeg would take a tile of them for a video."""
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(12))
    with pytest.raises(video.VideoError, match=r"photo\.heic is a photo in HEIC or AVIF"):
        video.read_clip(tmp_path / "photo.heic")


@pytest.mark.parametrize(
    "name", [*LOSSLESS, "wave.gif", pytest.param("wave.avif", marks=needs_avif)]
)
def test_a_damaged_animation_is_named(tmp_path, name):
    path = save(tmp_path / name, 100)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(content)
        if number % 3:
            for place in generator.integers(0, len(damaged), 1 + number % 5):
                damaged[place] = generator.integers(256)
        else:
            del damaged[generator.integers(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            video.read_clip(path)
        except video.VideoError as error:
            assert name in str(error)


@pytest.mark.parametrize("name", ANIMATIONS)
def test_an_animation_is_no_frame_of_a_folder(tmp_path, name):
    for number, picture in enumerate(pictures(2)):
        picture.save(tmp_path / f"{number}.png")
    path = save(tmp_path / name, 100)
    if path.suffix in formats.IMAGE_SUFFIXES:
        with pytest.raises(video.VideoError, match=rf"{path.stem}\{path.suffix} is an animation"):
            video.read_clip(tmp_path)
    else:  # was never one of its pictures
        assert len(video.read_clip(tmp_path)[0]) == 2


@pytest.mark.parametrize("name", ANIMATIONS)
def test_a_folder_of_clips_may_hold_animations(tmp_path, name):
    for split in ("train", "test"):
        folder = tmp_path / split / "clips"
        folder.mkdir(parents=True)
        save(folder / name, 100)
        (folder / name).with_suffix(".txt").write_text("a wave", "utf-8")
    clips = VideoClips(tmp_path, "train", 16, 6)
    assert [path.name for path in clips.paths] == [name]
    shown = clips[0].frames[:, 0].mean((1, 2)) * 255
    assert torch.allclose(shown, 30.0 + 40 * torch.arange(6), atol=3)


def test_folders_of_clips_know_the_endings_that_are_read(tmp_path):
    for suffix in formats.VIDEO_SUFFIXES:
        (tmp_path / f"c{suffix}").touch()
        (tmp_path / f"C{suffix.upper()}").touch()
    assert all(map(video.is_clip, tmp_path.iterdir()))
    for suffix in formats.IMAGE_SUFFIXES:
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        if suffix != ".avif" or features.check("avif"):
            pictures()[0].save(folder / f"1{suffix}")
            assert video.is_clip(folder) and not video.is_clip(folder / f"1{suffix}")
            assert video.read_clip(folder)[0].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError) as error:
        VideoClips(tmp_path / "bmp")
    assert all(s in str(error.value) for s in (*formats.VIDEO_SUFFIXES, *formats.MOVING_SUFFIXES))
