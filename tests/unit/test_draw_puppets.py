"""The puppets' limbs, drawn as layers, against the puppets' exact flow."""

from __future__ import annotations

import numpy as np
import pytest

from s2dm.data.puppets import render as puppets
from s2dm.flow.draw import Layer, Mask, Motion, render

FRAMES, SAMPLES = 16, 3


@pytest.fixture
def pieces(monkeypatch):
    """The pieces of the clip that was rendered last, in a depth that stays that of frame 1.

    Layers don't change their order, and limbs do.
    """
    kept = []
    clip = puppets._Renderer.clip

    def keeping(renderer, *words):
        kept[:] = renderer._pieces
        for piece in kept:
            piece.depth[:] = piece.depth[0]
        return clip(renderer, *words)

    monkeypatch.setattr(puppets._Renderer, "clip", keeping)
    return kept


def drawn(piece, size: int) -> Layer:
    """A limb as it is in frame 1, all of it, led by three of its points."""
    cells = np.zeros((size * SAMPLES,) * 2, bool)
    where, mask, _ = piece.texels(0, size)
    cells[where] = mask
    time = np.linspace(0, 1, FRAMES)
    tracks = []
    for point in ([20, 20], [100, 30], [40, 100]):
        local = piece.inverse[0] @ (point - piece.origin[0])
        path = piece.matrix @ local + piece.origin
        tracks.append(np.column_stack([path, time]))
    return Layer(region=Mask(cells), tracks=tuple(tracks), move="affine")


def test_limbs_drawn_as_layers_give_the_puppets_flow(pieces):
    size, hit, either = 128, 0, 0
    for action in (0, 5, 11, 20):
        exact = puppets.render_clip(3, action, 7, size=size, frames=FRAMES).flow
        layers = [drawn(piece, size) for piece in sorted(pieces, key=lambda one: one.depth[0])]
        flow = render(Motion(size, size, tuple(layers)), FRAMES).flow
        error = (flow.displacement - exact.displacement).norm(dim=1, keepdim=True)
        visible = exact.occlusion < 0.5
        assert error[visible].mean() <= 0.02
        moving = visible & (exact.magnitude() > 0.5)
        assert moving.sum() > 1000 and error[moving].mean() <= 0.1
        ours, theirs = flow.occlusion > 0.5, exact.occlusion > 0.5
        hit += (ours & theirs).sum().item()
        either += (ours | theirs).sum().item()
    assert hit / either >= 0.95
