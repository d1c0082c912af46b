"""Estimate Flow and Visualize Flow in a real ComfyUI."""

from fractions import Fraction

import pytest
import torch
from flow_models import PanModel

pytestmark = pytest.mark.comfyui


def frames(count: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 128, 136, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_optical_flow_model_is_used(rig, wrapped):
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    model = PanModel(4.0, 0.0)
    model = ModelPatcher(model, cpu, cpu) if wrapped else model
    (flow,) = rig.run("S2DMEstimateFlow", frames=frames(3), method="model", optical_flow=model)
    assert (flow.num_frames, flow.height, flow.width) == (3, 128, 136)
    assert flow.displacement[1, 0].unique().tolist() == [4.0]


@pytest.mark.parametrize("connected", [None, "raft_large.pth"])
def test_a_missing_model_says_what_to_do(rig, connected):
    with pytest.raises(ValueError, match=r"^Estimate Flow \(S2DM\): .*choose dis or farneback"):
        rig.run("S2DMEstimateFlow", frames=frames(2), method="model", optical_flow=connected)


@pytest.mark.parametrize(
    ("connected", "got"),
    [
        (torch.zeros(2, 8, 8, 2), r"a Tensor of shape \(2, 8, 8, 2\)"),
        (torch.zeros(2, 8, 8, 2).numpy(), r"a ndarray of shape \(2, 8, 8, 2\)"),
        ([torch.zeros(8, 8, 2).numpy()] * 2, "a list of 2"),
    ],
)
def test_flow_of_other_packs_is_told_from_a_model(rig, connected, got):
    """Some call flow that is measured already OPTICAL_FLOW, between neighbouring frames."""
    with pytest.raises(ValueError, match=f"got {got}, flow that is measured already.*choose dis"):
        rig.run("S2DMEstimateFlow", frames=frames(2), method="model", optical_flow=connected)


def test_a_model_that_measures_something_else_is_refused(rig):
    with pytest.raises(ValueError, match=r"^Estimate Flow \(S2DM\): .*got \(0, 0\)"):
        rig.run(
            "S2DMEstimateFlow",
            frames=frames(2),
            method="model",
            optical_flow=lambda first, second: torch.zeros_like(first[:, :2]),
        )


def test_alpha_is_dropped_and_one_frame_is_still(rig):
    (flow,) = rig.run("S2DMEstimateFlow", frames=frames(1, channels=4), method="dis")
    assert flow.num_frames == 1 and not flow.displacement.any()


def test_grey_moves_as_its_colour_of_three_channels_does(rig):
    grey = frames(3, channels=1)
    (flow,) = rig.run("S2DMEstimateFlow", frames=grey, method="dis")
    (colour,) = rig.run("S2DMEstimateFlow", frames=grey.expand(-1, -1, -1, 3), method="dis")
    assert torch.equal(flow.displacement, colour.displacement)


def test_a_video_in_place_of_frames(rig):
    from comfy_api.input_impl import VideoFromComponents
    from comfy_api.util import VideoComponents

    images = frames(3)
    video = VideoFromComponents(VideoComponents(images=images, frame_rate=Fraction(8)))
    (flow,) = rig.run("S2DMEstimateFlow", video=video, method="dis")
    (same,) = rig.run("S2DMEstimateFlow", frames=images, method="dis")
    assert torch.equal(flow.displacement, same.displacement)
    with pytest.raises(ValueError, match=r"^Estimate Flow \(S2DM\): .*got both"):
        rig.run("S2DMEstimateFlow", frames=images, video=video, method="dis")
    with pytest.raises(ValueError, match=r"^Estimate Flow \(S2DM\): .*got neither"):
        rig.run("S2DMEstimateFlow", method="dis")


def test_cancel_stops_the_estimate(rig):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    try:
        with pytest.raises(management.InterruptProcessingException):
            rig.run("S2DMEstimateFlow", frames=frames(4), method="dis")
    finally:
        management.interrupt_current_processing(False)


def test_pictures_and_masks_have_the_shape_of_the_flow(rig):
    flow = rig.flow(3, height=24, width=40)
    image, occlusion = rig.run("S2DMVisualizeFlow", flow=flow, full_colour_at=0.0)
    assert image.shape == (3, 24, 40, 3) and occlusion.shape == (3, 24, 40)
    assert (image[0] == 1).all() and image[1:].min() < 0.5
    paler, _ = rig.run("S2DMVisualizeFlow", flow=flow, full_colour_at=100.0)
    assert paler[1:].mean() > image[1:].mean()
