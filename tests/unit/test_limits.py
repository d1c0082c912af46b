"""What the benchmark of limits does to clips, and how it reads clothes and rooms."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

pytest.importorskip("cv2")

import limits

from s2dm.data.puppets import PERSONS, caption, render_clip
from s2dm.evaluation.clip_metrics import flow_error
from s2dm.flow import estimate_flow
from s2dm.sector import Anchor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clip():
    return render_clip(3, 26, 1000, size=64, frames=4)


@pytest.mark.parametrize(
    "change",
    [
        lambda frames, flow: limits.moved(frames, flow, 8),
        lambda frames, flow: limits.moved(frames, flow, -8),
        lambda frames, flow: limits.smaller(frames, flow, limits.SCALE),
        lambda frames, flow: limits.panned(frames, flow, 3),
    ],
    ids=["right", "left", "smaller", "panned"],
)
def test_a_changed_clip_still_moves_as_its_flow_says(clip, change):
    def unexplained(frames, flow):
        difference = (flow.warp(frames[:1]) - frames).abs().mean(1, keepdim=True)
        return difference[1:][flow.occlusion[1:] < 0.5].mean().item()

    frames, flow = change(clip.frames, clip.flow)
    assert frames.shape == clip.frames.shape
    assert flow.displacement.shape == clip.flow.displacement.shape
    assert (frames - clip.frames).abs().mean() > 0.02  # it is another clip
    assert unexplained(frames, flow) < 1.5 * unexplained(clip.frames, clip.flow) + 0.002
    still = torch.zeros_like(flow.displacement)
    assert unexplained(frames, dataclasses.replace(flow, displacement=still)) > 2 * unexplained(
        frames, flow
    )


def test_a_pan_moves_everything_and_hides_what_comes_in(clip):
    _, flow = limits.panned(clip.frames, clip.flow, 3)
    assert (flow.displacement[-1, 0, 0, :50] == 9).all()  # a pixel of the wall came from the right
    assert flow.occlusion[-1, 0, 0].tolist() == [0] * 55 + [1] * 9


class Autoencoder:
    """Latents that are pixels: exact, or all of one picture."""

    config = SimpleNamespace(block_out_channels=(1,))
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, keeps: float) -> None:
        self.keeps = keeps

    def encode(self, frames):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: frames))

    def decode(self, latents):
        return SimpleNamespace(sample=self.keeps * latents)


@pytest.mark.parametrize("keeps", [1, 0], ids=["exact", "grey"])
def test_what_the_autoencoder_gets_wrong_stands_beside_the_true_clips(
    tmp_path, monkeypatch, clip, keeps
):
    monkeypatch.setattr(limits, "PuppetClips", lambda *_, **__: [clip])
    monkeypatch.setattr(limits, "CHANGES", {"moved": lambda *pair: limits.moved(*pair, 8)})
    monkeypatch.setattr(
        limits, "WAYS", {"": lambda generator, prompt, true, *_: true[:1] + 0 * true}
    )
    monkeypatch.setattr(limits, "real_clips", lambda *_: {})
    generator = SimpleNamespace(
        checkpoint=limits.DEFAULT_CHECKPOINT,
        pipeline=SimpleNamespace(vae=Autoencoder(keeps)),
        chunk_size=3,
    )
    store = limits.Store(tmp_path, "this code")
    ((title, row),) = limits.measure_motion(generator, store, clips=1)[0].items()
    assert row["flow_error"] == 1  # what was made stands still
    if keeps:
        frames, flow = limits.moved(clip.frames, clip.flow, 8)
        anchor = Anchor.of(frames[:1], flow, lambda pictures: pictures)
        warped = flow_error(estimate_flow(anchor.latents), flow).figure
        assert 0 < row["true"] < 0.5
        assert row["autoencoder"] == pytest.approx(row["true"], abs=1e-3)
        assert row["warped"] == pytest.approx(warped, abs=1e-3)
        assert row["warped"] != pytest.approx(row["true"], abs=1e-3)
    else:
        assert row["autoencoder"] == row["warped"] == 1
    page = limits.markdown({"motion": {title: row}, "outfits": {}, "rooms": {}})
    shown = [f"{row[name]:.2f}" for name in ("true", "autoencoder", "warped")]
    assert f"| {' | '.join(shown)} |" in page
    # A run that goes on takes what is there, and says whose it is.
    generator.pipeline = None
    later = limits.Store(tmp_path, "later code")
    assert limits.measure_motion(generator, later, clips=1)[0] == {title: row}
    assert later.made_by == {"this code": {"moved", "through the autoencoder"}}


def test_a_thing_that_comes_and_goes_changes_the_room():
    generator = torch.Generator().manual_seed(0)
    frames = 0.5 + 0.02 * torch.randn(16, 3, 32, 48, generator=generator)
    still = torch.ones(1, 1, 32, 48, dtype=torch.bool)
    assert limits.largest_change(frames, still) < 10
    frames[7:9, :, 8:20, 8:20] += 0.3
    assert limits.largest_change(frames, still) == pytest.approx(0.3 * 255, rel=0.1)
    still[..., 6:22, 6:22] = False  # where the person is
    assert limits.largest_change(frames, still) < 10
    assert math.isnan(limits.largest_change(frames, ~still & still))  # nothing stands still


@pytest.mark.parametrize("person", [1, 9, 18, 22])
def test_clothes_are_read_off_true_puppets(person):
    who = PERSONS[person]
    (frame,) = render_clip(person, 26, 1000, frames=1).frames
    assert all(limits.dressed(frame, person, 26, who).values())
    others = {
        "top": dataclasses.replace(who, top_colour="blue"),
        "trousers": dataclasses.replace(who, trousers_colour="green"),
        "length": dataclasses.replace(
            who, trousers="jeans" if who.trousers == "shorts" else "shorts"
        ),
    }
    for name, other in others.items():
        assert not limits.dressed(frame, person, 26, other)[name], name


def test_an_unseen_outfit_is_worn_by_nobody_and_by_the_same_person():
    worn = {caption(person, 0).split(" wearing ")[1] for person in range(len(PERSONS))}
    for person, member in enumerate(PERSONS):
        other = limits.unseen(member, random.Random(person))
        assert other == limits.unseen(member, random.Random(person))
        assert caption(other, 0).split(" wearing ")[1] not in worn
        assert (other.gender, other.glasses, other.height) == (
            member.gender, member.glasses, member.height
        )  # fmt: skip


def test_the_readme_quotes_the_file():
    result = json.loads((ROOT / "docs/results/limits.json").read_text("utf-8"))
    table, command = result["table"], result["protocol"]["command"]
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert command in readme
    claims = readme.partition("## Quick start")[2].partition("## Nodes")[0]
    for row in table["motion"].values():
        for name in ("flow_error", "autoencoder", "warped"):
            assert f"{row[name]:.2f}" in claims
    for rooms in table["rooms"].values():
        changed = sum(one["change"] > limits.CHANGED for one in rooms)
        assert f"{changed} of {len(rooms)} clips" in claims
    seen, unseen = table["outfits"].values()
    assert all(one["top"] and one["trousers"] and one["length"] for one in seen)
    for short in (False, True):
        right = [one["length"] for one in unseen if one["shorts"] == short]
        assert f"{sum(right)} of {len(right)}" in claims
