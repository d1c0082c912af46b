"""The gallery of the README: it shows what is evaluated first, and every clip in its place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from random_checkpoint import tiny_config, write_random_checkpoint

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

import gallery

from s2dm.data import DataConfig
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.run import EvaluationConfig, evaluate
from s2dm.models import SamplingConfig
from s2dm.video import to_uint8

COLOURS = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 160, 0), (0, 160, 255), (160, 0, 160)]


def plain(colour: tuple[int, int, int], frames: int = 3) -> torch.Tensor:
    """A clip (N,3,24,32) of one colour that gets darker from frame to frame."""
    tint = torch.tensor(colour).float()[:, None, None].expand(3, 24, 32) / 255
    return torch.stack([tint / (1 + number) for number in range(frames)])


@pytest.fixture
def moments() -> list[Image.Image]:
    made = [
        ("a man", [plain(colour) for colour in COLOURS[:3]]),
        ("a woman with a long caption", [plain(colour) for colour in COLOURS[3:]]),
    ]
    return gallery.pictures(made, ["above", "in the middle", "below"])


def test_every_clip_has_its_place_and_moves(moments):
    assert len(moments) == 3
    width, height = moments[0].size
    cell = 32 * gallery.SCALE + gallery.GAP, 24 * gallery.SCALE + gallery.GAP
    left, top = width - 2 * cell[0], height - 3 * cell[1]
    for moment, picture in enumerate(moments):
        for number, colour in enumerate(COLOURS):
            column, row = divmod(number, 3)
            where = left + column * cell[0] + cell[0] // 2, top + row * cell[1] + cell[1] // 2
            expected = [round(value / (1 + moment)) for value in colour]
            assert np.abs(np.subtract(picture.getpixel(where), expected)).max() <= 1
    # Captions above, names at the left, the same at every moment.
    for box in ((left, 0, width, top), (0, top, left, height)):
        text = np.asarray(moments[0].crop(box))
        assert (text < 128).any()
        assert all(np.array_equal(np.asarray(picture.crop(box)), text) for picture in moments)


def test_the_picture_is_animated_and_small_enough_for_a_page(moments, tmp_path, monkeypatch):
    path = gallery.write(tmp_path / "images" / "gallery.webp", moments, fps=4)
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0  # for ever
        # A frame is only decoded, and its duration known, when its pixels are asked for.
        frames = [
            (frame.convert("RGB").size, frame.info["duration"])
            for frame in ImageSequence.Iterator(animation)
        ]
    assert frames == [(moments[0].size, 250)] * 3
    before = path.read_bytes()
    assert gallery.write(path, moments, fps=4).read_bytes() == before
    monkeypatch.setattr(gallery, "LARGEST", 10)
    with pytest.raises(ValueError, match="at most 10 bytes"):
        gallery.write(path, moments[:1])
    assert path.read_bytes() == before


def test_the_clips_are_the_first_that_are_evaluated(tmp_path, capsys):
    config = tiny_config(resolution=(32, 32), frames=3, sampling=SamplingConfig(1, 2.0, 1.0))
    checkpoint = write_random_checkpoint(tmp_path / "tiny.safetensors", config)
    ((caption, clips),) = gallery.columns(checkpoint, 1)
    assert caption in capsys.readouterr().out
    evaluation = EvaluationConfig(
        checkpoint=checkpoint,
        output=tmp_path / "out",
        data=DataConfig(size=32, frames=3),
        clips=1,
        cpu=True,
    )
    for row, clip in zip(gallery.ROWS, clips, strict=True):
        evaluate(dataclasses.replace(evaluation, variants=(Variant(row),)))
        (stored,) = (tmp_path / "out" / "clips").glob(f"{row}-*/*.npz")
        with np.load(stored) as measured:
            shown = np.stack([to_uint8(frame) for frame in clip])
            assert np.array_equal(shown, measured["frames"])
