"""The flow field: its rules, and what each of its methods promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.flow import FlowError, FlowField

quick = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 40)
counts = st.integers(1, 5)


def random_field(
    frames: int, height: int, width: int, seed: int = 0, reach: float = 4
) -> FlowField:
    generator = torch.Generator().manual_seed(seed)
    displacement = torch.randn(frames, 2, height, width, generator=generator) * reach
    occlusion = torch.rand(frames, 1, height, width, generator=generator)
    displacement[0] = occlusion[0] = 0
    return FlowField(displacement, occlusion)


def uniform_field(frames: int, height: int, width: int, x: float, y: float) -> FlowField:
    """Frame i came from (x, y) * i."""
    steps = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1, 1)
    displacement = steps * torch.tensor([x, y]).view(1, 2, 1, 1)
    return FlowField(
        displacement.expand(-1, -1, height, width).clone(), torch.zeros(frames, 1, height, width)
    )


def moving_square(frames: int = 5, size: int = 48, step: int = 4) -> tuple[torch.Tensor, FlowField]:
    """A textured square that slides right over a textured, still background: frames and flow."""
    generator = torch.Generator().manual_seed(1)
    background = torch.rand(3, size, size, generator=generator)
    square = torch.rand(3, 10, 10, generator=generator)
    images = background.repeat(frames, 1, 1, 1)
    displacement = torch.zeros(frames, 2, size, size)
    occlusion = torch.zeros(frames, 1, size, size)
    for i in range(frames):
        left = 10 + step * i
        occlusion[i, :, 20:30, 10:20] = 1
        images[i, :, 20:30, left : left + 10] = square
        displacement[i, 0, 20:30, left : left + 10] = -step * i
        occlusion[i, :, 20:30, left : left + 10] = 0
    return images, FlowField(displacement, occlusion)


def assert_equal(a: FlowField, b: FlowField, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.displacement, b.displacement, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.occlusion, b.occlusion, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("displacement", "occlusion", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4), r"displacement: expected \(N,2,H,W\)"),
        (torch.zeros(0, 2, 4, 4), torch.zeros(0, 1, 4, 4), "at least one frame"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 5), r"got \(2, 1, 4, 5\)"),
        (torch.zeros(2, 2, 4, 4).half(), torch.zeros(2, 1, 4, 4), "expected float32"),
        (torch.full((2, 2, 4, 4), torch.nan), torch.zeros(2, 1, 4, 4), "NaN"),
        (torch.zeros(2, 2, 4, 4), torch.full((2, 1, 4, 4), 2.0), r"\[0, 1\]"),
        (torch.ones(2, 2, 4, 4), torch.zeros(2, 1, 4, 4), "expected zeros in frame 1"),
        ([0.0], torch.zeros(2, 1, 4, 4), "expected a torch tensor, got list"),
    ],
)
def test_broken_fields_are_refused(displacement, occlusion, message):
    with pytest.raises(FlowError, match=message):
        FlowField(displacement, occlusion)


@quick
@given(counts, sizes, sizes)
def test_a_still_field_warps_nothing(frames, height, width):
    image = torch.rand(1, 3, height, width)
    warped = FlowField.zeros(frames, height, width).warp(image)
    torch.testing.assert_close(warped, image.expand(frames, -1, -1, -1), atol=1e-5, rtol=0)


def test_warp_samples_the_first_frame_at_whole_pixels_exactly():
    image = torch.rand(1, 3, 12, 15)
    warped = uniform_field(3, 12, 15, x=-2, y=1).warp(image)
    torch.testing.assert_close(warped[1, :, :-1, 2:], image[0, :, 1:, :-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(warped[1, :, :-1, 0], image[0, :, 1:, 0], atol=1e-5, rtol=0)


def test_warp_takes_one_image_a_frame_and_refuses_others():
    field = uniform_field(3, 8, 8, 1, 0)
    images = torch.rand(3, 4, 8, 8)
    torch.testing.assert_close(field.warp(images)[2, :, :, :6], images[2, :, :, 2:])
    with pytest.raises(FlowError, match=r"got \(2, 4, 8, 8\)"):
        field.warp(images[:2])


def test_exact_flow_reproduces_every_visible_pixel():
    images, field = moving_square()
    error = (field.warp(images[:1]) - images).abs() * (1 - field.occlusion)
    assert error.max() < 1e-4


@quick
@given(counts, st.integers(1, 4), st.integers(1, 4))
def test_resize_scales_vectors_with_the_size(frames, by_height, by_width):
    field = uniform_field(frames, 6, 9, x=1.5, y=-0.5)
    assert_equal(
        field.resize(6 * by_height, 9 * by_width),
        uniform_field(frames, 6 * by_height, 9 * by_width, 1.5 * by_width, -0.5 * by_height),
    )


def test_a_crop_moves_as_its_part_of_the_picture():
    field = random_field(3, 6, 9)
    part = field.crop(2, 3, top=1, left=4)
    assert torch.equal(part.displacement, field.displacement[:, :, 1:3, 4:7])
    assert torch.equal(part.occlusion, field.occlusion[:, :, 1:3, 4:7])
    assert_equal(field.crop(6, 9), field, 0)


@quick
@given(counts, st.integers(1, 3))
def test_growing_and_shrinking_a_linear_field_gives_it_back_inside(frames, factor):
    """A rotation or zoom is linear in x and y, so bilinear growth and averaging keep it."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    displacement = torch.stack([0.1 * x - 0.2 * y, 0.3 * x + 0.1 * y]).repeat(frames, 1, 1, 1)
    displacement[0] = 0
    field = FlowField(displacement, torch.zeros(frames, 1, 12, 16))
    back = field.resize(12 * factor, 16 * factor).resize(12, 16)
    torch.testing.assert_close(
        back.displacement[..., 1:-1, 1:-1], displacement[..., 1:-1, 1:-1], atol=1e-4, rtol=0
    )


@quick
@given(sizes, sizes, sizes, sizes)
def test_half_frame_units_do_not_depend_on_the_size(height, width, other_height, other_width):
    """The same motion, a quarter of the frame right and half of it down, at two sizes."""
    expected = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1).expand(1, 2, 7, 5)
    for h, w in ((height, width), (other_height, other_width)):
        condition = uniform_field(2, h, w, x=w / 4, y=h / 2).condition(7, 5)
        assert condition.shape == (2, 3, 7, 5)
        torch.testing.assert_close(condition[1:, :2], expected)
        assert not condition[0].any()


def test_condition_averages_where_it_shrinks():
    field = random_field(2, 8, 8)
    mean = field.displacement[1, 0].mean() * 2 / 8
    torch.testing.assert_close(field.condition(1, 1)[1, 0, 0, 0], mean)


@quick
@given(counts, st.integers(2, 30), st.integers(2, 30))
def test_condition_and_from_condition_are_inverse(frames, height, width):
    field = random_field(frames, height, width)
    assert_equal(FlowField.from_condition(field.condition(height, width), height, width), field)


def test_from_condition_makes_a_lawful_field_of_anything_finite():
    condition = torch.randn(3, 3, 8, 8) * 3
    field = FlowField.from_condition(condition, 16, 24)
    assert (field.num_frames, field.height, field.width) == (3, 16, 24)
    with pytest.raises(FlowError, match=r"expected \(N,3,h,w\)"):
        FlowField.from_condition(condition[:, :2], 16, 24)


@quick
@given(st.floats(-4, 4))
def test_scale_multiplies_the_motion(factor):
    field = random_field(3, 5, 6)
    scaled = field.scale(factor)
    torch.testing.assert_close(scaled.displacement, field.displacement * factor)
    assert (scaled.occlusion <= field.occlusion).all()
    if factor == 0:
        assert_equal(scaled, FlowField.zeros(3, 5, 6), 0)


def test_retime_is_linear_in_time():
    field = uniform_field(5, 4, 4, x=2, y=1)
    assert_equal(field.retime(9), uniform_field(9, 4, 4, x=1, y=0.5))
    assert_equal(field.retime(3), uniform_field(3, 4, 4, x=4, y=2))


@quick
@given(counts, st.integers(1, 40))
def test_retime_gives_any_number_of_frames_and_keeps_the_ends(frames, target):
    field = random_field(frames, 4, 5)
    retimed = field.retime(target)
    assert len(retimed) == target
    assert not retimed.displacement[0].any()
    if target > 1:
        torch.testing.assert_close(retimed.displacement[-1], field.displacement[-1])


def test_retime_needs_a_frame():
    with pytest.raises(FlowError, match="at least one frame"):
        FlowField.zeros(3, 4, 4).retime(0)


def test_select_picks_frames():
    field = random_field(5, 4, 4)
    chosen = field.select([0, 3, -1])
    torch.testing.assert_close(chosen.displacement, field.displacement[[0, 3, 4]])
    for indices in ([], [2, 3]):
        with pytest.raises(FlowError, match="must begin with frame 1"):
            field.select(indices)
    with pytest.raises(IndexError):
        field.select([0, 5])


def test_methods_leave_the_field_alone():
    field = random_field(3, 9, 7)
    copy = FlowField(field.displacement.clone(), field.occlusion.clone())
    field.scale(2), field.resize(5, 5), field.pad(9, 8), field.retime(5), field.condition(3, 3)
    field.warp(torch.rand(1, 3, 9, 7))
    assert_equal(field, copy, 0)


def test_a_padded_field_moves_as_its_border_does():
    field = random_field(3, 5, 4)
    padded = field.pad(7, 6)
    assert (padded.height, padded.width) == (7, 6)
    assert_equal(padded.crop(5, 4), field, 0)
    torch.testing.assert_close(
        padded.displacement[..., 5:, :4], field.displacement[..., 4:, :].expand(-1, -1, 2, -1)
    )
    torch.testing.assert_close(
        padded.occlusion[..., :5, 4:], field.occlusion[..., 3:].expand(-1, -1, -1, 2)
    )


def test_magnitude_is_the_length():
    torch.testing.assert_close(
        uniform_field(2, 3, 3, 3, 4).magnitude()[1], torch.full((1, 3, 3), 5.0)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_warping_half_precision_is_exact_where_nothing_moves(dtype):
    image = torch.rand(1, 3, 4, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    warped = FlowField.zeros(2, 4, 300).warp(image)
    assert warped.dtype == dtype
    torch.testing.assert_close(warped, image.expand(2, -1, -1, -1), rtol=0, atol=1e-3)
