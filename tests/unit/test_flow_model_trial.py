"""A flow model is believed only if it measures a known shift, in each of RAFT's conventions."""

import pytest
import torch
from flow_models import PanModel, everywhere, shift_between
from torchvision.models.optical_flow import raft_small

from s2dm.flow import FlowError, estimate_flow

cv2 = pytest.importorskip("cv2")
cv2.setNumThreads(1)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def raft(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """In torchvision's conventions."""
    return everywhere(shift_between(first, second), first)


def dis(first: torch.Tensor, second: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A real estimator, for pictures from low to high."""
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [
        ((images.mean(dim=1) - low) / (high - low) * 255).clamp(0, 255).byte().numpy()
        for images in (first, second)
    ]
    flows = [estimator.calc(one, other, None) for one, other in zip(*grey, strict=True)]
    return torch.stack([torch.from_numpy(flow).permute(2, 0, 1) for flow in flows])


def test_a_real_estimator_passes(clip):
    moving = torch.stack([clip[0], clip[0].roll(3, dims=2)])
    field = estimate_flow(moving, lambda first, second: dis(first, second, -1, 1))
    assert field.num_frames == 2


def test_a_model_is_tried_once_a_clip(clip):
    model = PanModel(1.0, 0.0)
    estimate_flow(clip, model)
    assert (model.trials, len(model.asked)) == (1, 2)


@pytest.mark.parametrize(
    ("model", "measured"),
    [
        (lambda a, b: -raft(a, b), r"\(-6, 4\) and \(6, -4\)\. Use"),
        (lambda a, b: raft(a, b).flip(1), r"\(-4, 6\)"),
        (lambda a, b: raft(a, b) / 8, r"\(0\.75, -0\.5\)"),
        (lambda a, b: raft(a, b) * 2 / 128, r"\(0\.0938, -0\.0625\)"),
        (lambda a, b: raft(a, b)[:1].expand(2, -1, -1, -1), r"\(6, -4\) and \(6, -4\)"),
        (lambda a, b: torch.zeros_like(a[:, :2]), r"\(0, 0\)"),
    ],
    ids=["backwards", "y before x", "cells of 8", "half-frames", "one way alone", "none"],
)
def test_another_convention_is_refused_with_what_it_measured(clip, model, measured):
    with pytest.raises(FlowError, match=rf"of \(6, -4\) pixels .*, got {measured}"):
        estimate_flow(clip, model)


@pytest.mark.parametrize("high", [1, 255])
def test_another_range_of_pictures_is_named(clip, high):
    def model(first, second):
        in_range = first.min() >= 0
        return dis(first, second, 0, high) if in_range else torch.zeros_like(first[:, :2])

    wanted = rf"wants images in \[0,{high}\], and gets them in \[-1,1\]"
    with pytest.raises(FlowError, match=wanted):
        estimate_flow(clip, model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Conv2d(3, 2, 1), r"expected to take images .*, got TypeError"),
        (lambda a, b: torch.nn.functional.conv2d(a, torch.zeros(2, 6, 1, 1)), "RuntimeError.*RAFT"),
    ],
)
def test_a_model_of_another_kind_is_refused(clip, model, message):
    with pytest.raises(FlowError, match=message):
        estimate_flow(clip, model)


def test_raft_without_trained_weights_is_refused(clip):
    torch.manual_seed(0)
    with pytest.raises(FlowError, match="trained weights"):
        estimate_flow(clip, raft_small(weights=None).eval())


def test_running_out_of_memory_stays_what_it_is(clip):
    def full(first, second):
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        estimate_flow(clip, full)
