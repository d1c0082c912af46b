"""Thumbnails of the templates show every frame of a clip."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def thumbnails(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    before = set(sys.modules)
    import thumbnails

    yield thumbnails
    for name in set(sys.modules) - before:
        if str(ROOT / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_frame_is_in_the_picture(thumbnails):
    """Sixteen greys in the one clip, sixteen reds in the other, all found again."""
    levels = torch.linspace(0.1, 0.9, 16)
    grey = levels[:, None, None, None].expand(16, 3, 128, 128)
    red = grey * torch.tensor([1.0, 0, 0])[:, None, None]
    picture = np.asarray(thumbnails.thumbnail([grey, red]))
    assert picture.shape == (picture.shape[0], 768, 3)
    centres = (np.arange(8) + 0.5) / 8 * picture.shape[1]
    rows = (np.arange(4) + 0.5) / 4 * picture.shape[0]
    cells = picture[rows.astype(int)][:, centres.astype(int)].astype(int)
    expected = (levels * 255).round().reshape(4, 4).numpy()
    assert np.abs(cells[:, :4, 0] - expected).max() <= 2
    assert np.abs(cells[:, 4:, 0] - expected).max() <= 2 and cells[:, 4:, 1].max() <= 2


def test_a_picture_stands_beside_its_clip_as_large_as_all_frames(thumbnails, monkeypatch):
    levels = torch.linspace(0.1, 0.9, 16)
    video = levels[:, None, None, None].expand(16, 3, 128, 128)
    monkeypatch.setattr(thumbnails, "read_clip", lambda path: (video, 8.0))
    monkeypatch.setattr(thumbnails, "pick", lambda files, name: name)
    name = next(name for name, beside in thumbnails.BESIDE.items() if beside == "picture")
    picture = np.asarray(thumbnails.thumbnail(thumbnails.clips(name, []))).astype(int)
    assert picture.shape[1] == 768 and abs(picture.shape[0] - 384) <= 8
    assert np.abs(picture[10:-10, 10:370] - 0.1 * 255).max() <= 2
    assert np.abs(picture[-40, -40] - 0.9 * 255).max() <= 2


def test_each_template_has_such_a_picture(thumbnails):
    templates = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert templates == {f"s2dm_{name}" for name in thumbnails.BESIDE}
    for name in templates:
        with Image.open(ROOT / "workflows" / f"{name}.jpg") as picture:
            assert picture.format == "JPEG"
            # Two blocks of four by four square frames.
            assert picture.width == 768 and abs(picture.height - 384) <= 8
