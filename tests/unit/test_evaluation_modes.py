"""The rows of an evaluation, as they are named on the command line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s2dm.data.puppets import render_clip
from s2dm.evaluation.modes import Variant
from s2dm.flow import pose_flow


@pytest.mark.parametrize("text", ["given-flow", "zero-flow:independent", "two-stage:mixed:0.25"])
def test_rows_are_written_as_they_are_read(text):
    assert str(Variant.parse(text)) == text


def test_rows_say_what_they_are():
    assert Variant.parse("given-flow:shared") == Variant("given-flow")
    assert Variant.parse("two-stage:mixed:0.25").title.endswith("mixed noise (0.25)")
    assert Variant("true").title == "true clip"


@pytest.mark.parametrize(
    "text, message",
    [
        ("dream", "given-flow, two-stage.*'dream'"),
        ("given-flow:alone", "expected one of"),
        ("given-flow:mixed:2", "from 0 to 1, got 2"),
        ("given-flow:mixed:half", "a share"),
        ("given-flow:shared:0.5", "MODE:SHARING"),
        ("true:independent", "no noise to share"),
    ],
)
def test_rows_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Variant.parse(text)


def test_given_pose_is_measured_by_the_true_flow():
    class Sampler:
        def follow(self, prompt, flow, variant, seed):
            self.given = flow
            return torch.zeros(3, 3, 64, 64)

    clip, sampler = render_clip(1, 2, 0, size=64, frames=3), Sampler()
    made = Variant("given-pose").make(sampler, clip, 0)
    assert torch.equal(sampler.given.displacement, pose_flow(clip.pose, 64, 64).displacement)
    assert made.flow is clip.flow and made.still is clip.still
    with pytest.raises(ValueError, match="given-pose needs clips whose keypoints are known"):
        Variant("given-pose").make(sampler, dataclasses.replace(clip, pose=None), 0)
