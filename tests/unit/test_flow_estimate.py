"""Flow estimation against motion that is known exactly."""

import sys
from math import cos, pi, sin

import pytest
import torch
import torch.nn.functional as F
from flow_models import PanModel
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, estimate_flow

cv2 = pytest.importorskip("cv2")
cv2.setNumThreads(1)  # its threads spin when the machine is busy
METHODS = ("dis", "farneback")


def pattern(height: int, width: int, seed: int = 0, grain: int = 6) -> torch.Tensor:
    """Smooth coloured blobs, (3,H,W): texture at every place, of about `grain` pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // grain + 2, width // grain + 2, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)


def moved(canvas: torch.Tensor, displacement: torch.Tensor, margin: int) -> torch.Tensor:
    """`canvas` without its margin, after the motion whose backward flow is `displacement`."""
    height, width = displacement.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    size = torch.tensor([canvas.shape[2], canvas.shape[1]])
    position = torch.stack([x, y], dim=-1) + displacement.permute(1, 2, 0) + margin
    grid = (2 * position + 1) / size - 1
    return F.grid_sample(canvas[None], grid[None].float(), align_corners=False)[0].clamp(0, 1)


def panning(frames: int, height: int, width: int, step: tuple[float, float]) -> torch.Tensor:
    """A clip of which every frame came from `step` * i."""
    margin = 40
    canvas = pattern(height + 2 * margin, width + 2 * margin)
    vector = torch.tensor(step).view(2, 1, 1).expand(2, height, width)
    return torch.stack([moved(canvas, vector * i, margin) for i in range(frames)])


def square_clip(frames: int = 4, step: int = 5) -> torch.Tensor:
    """A 24 pixel square that slides right over a still background, 96x96."""
    clip = pattern(96, 96, seed=1).repeat(frames, 1, 1, 1)
    for i in range(frames):
        clip[i, :, 36:60, 20 + step * i : 44 + step * i] = pattern(24, 24, seed=2, grain=4)
    return clip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("height", "width", "step"),
    [(120, 96, (3.0, -2.0)), (40, 40, (1.5, 1.0)), (64, 300, (-4.0, 0.5))],
)
def test_a_pan_is_found_in_any_size(method, height, width, step):
    field = estimate_flow(panning(3, height, width, step), method)
    assert (field.num_frames, field.height, field.width) == (3, height, width)
    inner = field.displacement[:, :, 10:-10, 10:-10]
    for i in (1, 2):
        expected = torch.tensor(step).view(2, 1, 1) * i
        assert (inner[i] - expected).norm(dim=0).median() < 0.2
        assert field.occlusion[i, :, 10:-10, 10:-10].mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_rotation_is_found(method):
    size, margin, turn = 96, 40, 4 * pi / 180
    y, x = torch.meshgrid(torch.arange(size) - 47.5, torch.arange(size) - 47.5, indexing="ij")
    rotated = torch.stack([cos(turn) * x - sin(turn) * y, sin(turn) * x + cos(turn) * y])
    displacement = rotated - torch.stack([x, y])
    canvas = pattern(size + 2 * margin, size + 2 * margin)
    clip = torch.stack([moved(canvas, displacement * i, margin) for i in (0, 1)])
    error = (estimate_flow(clip, method).displacement[1] - displacement).norm(dim=0)
    assert error[10:-10, 10:-10].mean() < 0.25


def test_motion_far_larger_than_a_step_is_followed():
    """3 pixels a frame, 39 at the end: beyond what one pair could tell."""
    field = estimate_flow(panning(14, 96, 128, (3.0, 0.0)))
    last = field.displacement[-1, :, 10:-10, 10 : 128 - 45]
    assert (last - torch.tensor([39.0, 0.0]).view(2, 1, 1)).norm(dim=0).median() < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_moving_square_moves_and_its_background_does_not(method):
    field = estimate_flow(square_clip(), method)
    last = field.displacement[3]
    assert (last[0, 40:56, 40:54] + 15).abs().median() < 0.5
    assert last[:, :20].norm(dim=0).max() < 0.5
    assert last[:, 70:].norm(dim=0).max() < 0.5


def test_occlusion_is_where_the_square_stood():
    occlusion = estimate_flow(square_clip()).occlusion[:, 0]
    assert not occlusion[0].any()
    assert occlusion[3, 40:56, 21:34].mean() > 0.8  # uncovered: 15 pixels wide at frame 4
    assert occlusion[3, 40:56, 40:54].mean() < 0.1  # the square itself
    assert occlusion[3, :25].mean() < 0.05


def test_what_enters_the_picture_is_occluded():
    occlusion = estimate_flow(panning(3, 96, 96, (6.0, 0.0))).occlusion[2, 0]
    assert occlusion[10:-10, -10:].mean() > 0.9
    assert occlusion[10:-10, 10:-20].mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 17), st.sampled_from([(120, 96), (40, 40), (7, 5), (1, 1)]), st.booleans())
def test_a_still_clip_is_exactly_zero(method, frames, size, noisy):
    clip = pattern(*size).repeat(frames, 1, 1, 1)
    if noisy:
        generator = torch.Generator().manual_seed(frames)
        clip = (clip * 0.8 + 0.1 + torch.randn(clip.shape, generator=generator) / 255).clamp(0, 1)
    field = estimate_flow(clip, method)
    assert len(field) == frames
    assert not field.displacement.any()
    assert not field.occlusion.any()


def test_returning_to_the_first_frame_is_exactly_zero_again():
    clip = square_clip()
    field = estimate_flow(torch.cat([clip, clip[:1], clip[1:2]]))
    assert not field.displacement[4].any()
    assert field.displacement[5].any()


@pytest.mark.parametrize("size", [(7, 5), (1, 9), (16, 16)])
@pytest.mark.parametrize("method", METHODS)
def test_tiny_moving_pictures_give_a_lawful_field(method, size):
    clip = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    assert estimate_flow(clip, method).displacement.shape == (3, 2, *size)


def test_progress_counts_every_frame():
    seen = []
    estimate_flow(square_clip(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize(("height", "width"), [(128, 160), (40, 60), (130, 97)])
def test_a_model_is_asked_from_frame_to_first_at_a_size_it_can_take(height, width, as_list):
    clip = panning(2, height, width, (1.0, 0.0))
    model = PanModel(8.0, 4.0, as_list)
    field = estimate_flow(clip, model)
    ((first, second),) = model.asked
    assert first.dtype == torch.float64 and min(first.shape[2:]) >= 128
    assert first.shape[2] % 8 == 0 and first.shape[3] % 8 == 0
    assert first.min() >= -1 and first.max() <= 1 and first.min() < -0.1
    if (height, width) == (128, 160):
        torch.testing.assert_close(first[0].float(), clip[1] * 2 - 1)
        torch.testing.assert_close(second[0].float(), clip[0] * 2 - 1)
    expected = torch.tensor([8 * width / first.shape[3], 4 * height / first.shape[2]])
    torch.testing.assert_close(field.displacement[1].mean(dim=(1, 2)), expected)
    reach = 9
    assert not field.occlusion[1, :, : height - reach, : width - reach].any()
    assert field.occlusion[1, :, -2:, -2:].all()


def test_a_model_is_spared_still_pairs():
    model = PanModel(3, 3)
    assert not estimate_flow(torch.rand(1, 3, 32, 32).repeat(3, 1, 1, 1), model).magnitude().any()
    assert (model.trials, model.asked) == (0, [])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda a, b: a[:, :2, ::8, ::8], r"expected to return \(B,2,H,W\)"),
        (lambda a, b: None, "NoneType"),
        (lambda a, b: [], "list"),
        (lambda a, b: a[:, :2] * torch.nan, "NaN"),
        ("raft", "one of dis, farneback or a flow model, got 'raft'"),
        (3, "flow model to call, got int"),
    ],
)
def test_a_wrong_model_says_what_is_wrong(model, message):
    with pytest.raises(FlowError, match=message):
        estimate_flow(square_clip(2), model)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 8, 8, 3), r"expected \(N,3,H,W\)"),
        (torch.zeros(0, 3, 8, 8), "at least one frame"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floats in"),
        (torch.full((2, 3, 8, 8), 255.0), "Rescale"),
        (torch.full((2, 3, 8, 8), torch.nan), "NaN"),
    ],
)
def test_bad_frames_are_refused(frames, message):
    with pytest.raises(FlowError, match=message):
        estimate_flow(frames)


def test_a_missing_opencv_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(FlowError, match="pip install opencv-python-headless"):
        estimate_flow(square_clip(2))
    estimate_flow(square_clip(2), PanModel(1, 1))  # needs none


def test_half_precision_frames_are_taken():
    assert estimate_flow(square_clip(2).half()).displacement.dtype == torch.float32


@pytest.mark.slow
def test_puppets_are_followed():
    """The yardstick itself: at most 0.4 of the mean motion of held-out puppets."""
    from s2dm.data.puppets import render_clip, split

    errors = []
    for person, action in split("test")[::16]:
        clip = render_clip(person, action, take=0)
        field = estimate_flow(clip.frames)
        moving = (clip.flow.magnitude() > 0.5) & (clip.flow.occlusion < 0.5)
        error = (field.displacement - clip.flow.displacement).norm(dim=1, keepdim=True)
        errors.append(error[moving].mean() / clip.flow.magnitude()[moving].mean())
    assert torch.stack(errors).mean() < 0.4
