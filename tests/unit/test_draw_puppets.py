"""The puppets' limbs, drawn as layers, against the puppets' exact flow."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from s2dm.data.puppets import render as puppets
from s2dm.flow.draw import Layer, Mask, Motion, regions, render

SIZE, FRAMES = 128, 16


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


def drawn(piece) -> Layer:
    """A limb as it is in frame 1, all of it, led by three of its points."""
    cells = np.zeros((SIZE * puppets._SUB,) * 2, bool)
    where, mask, _ = piece.texels(0, SIZE)
    cells[where] = mask
    time = np.linspace(0, 1, FRAMES)
    tracks = []
    for point in ([20, 20], [100, 30], [40, 100]):
        local = piece.inverse[0] @ (point - piece.origin[0])
        path = piece.matrix @ local + piece.origin
        tracks.append(np.column_stack([path, time]))
    return Layer(region=Mask(cells), tracks=tuple(tracks), move="affine")


def both(pieces, action: int):
    """The puppets' flow of a clip, and that of its limbs drawn as layers."""
    exact = puppets.render_clip(3, action, 7, size=SIZE, frames=FRAMES).flow
    layers = [drawn(piece) for piece in sorted(pieces, key=lambda one: one.depth[0])]
    return exact, render(Motion(SIZE, SIZE, tuple(layers)), FRAMES).flow


def hidden(exact, flow) -> tuple[int, int]:
    """Pixels that are occluded in both, and in either."""
    ours, theirs = flow.occlusion > 0.5, exact.occlusion > 0.5
    return (ours & theirs).sum().item(), (ours | theirs).sum().item()


def test_limbs_drawn_as_layers_give_the_puppets_flow(pieces):
    counts = []
    for action in (0, 5, 11, 20):
        exact, flow = both(pieces, action)
        error = (flow.displacement - exact.displacement).norm(dim=1, keepdim=True)
        visible = exact.occlusion < 0.5
        assert error[visible].mean() <= 0.02
        moving = visible & (exact.magnitude() > 0.5)
        assert moving.sum() > 1000 and error[moving].mean() <= 0.1
        counts.append(hidden(exact, flow))
    hit, either = (sum(column) for column in zip(*counts, strict=True))
    assert hit / either >= 0.95
    # In the clip with the least occlusion most of it are slivers along outlines.
    assert min(hit / either for hit, either in counts) >= 0.89


def test_what_differs_is_how_outlines_are_sampled(pieces, monkeypatch):
    """0.90 of this clip: puppets go by most of a pixel in thirds, drawn layers by its centre."""
    monkeypatch.setattr(puppets, "_SUB", 9)
    monkeypatch.setattr(regions, "_FINE", 9)
    # The package's `render` is the function: the module is reached by its name.
    monkeypatch.setattr(sys.modules["s2dm.flow.draw.render"], "_BESIDE", 1 / 9)
    # Of the samples of a pixel, unsorted, the middle one is its centre.
    monkeypatch.setattr(puppets.np, "partition", lambda samples, kth, axis: samples)
    hit, either = hidden(*both(pieces, 5))
    assert hit / either >= 0.95
