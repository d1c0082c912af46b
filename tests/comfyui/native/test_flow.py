"""Flow as conditioning: what acts, where, when, and what it composes with."""

from __future__ import annotations

import pytest
import torch
from compare import relative

from s2dm.models import FUSIONS

pytestmark = pytest.mark.comfyui


def zeroed(state):
    """The adapter's weights before training: nothing comes out of it."""
    return {
        name: torch.zeros_like(weight) if ".to_" in name else weight
        for name, weight in state.items()
    }


@pytest.fixture(scope="module", params=FUSIONS)
def fused(request, rig_of):
    """The checkpoint with each fusion."""
    return rig_of(request.param)


def test_flow_acts(fused):
    one = fused.sample(fused.encode(fused.flow(4, seed=1)))
    other = fused.sample(fused.encode(fused.flow(4, seed=2)))
    assert relative(one, other) > 1e-3


def test_an_untrained_adapter_changes_nothing(fused):
    """Bit for bit: the same weights, the same arithmetic, plus zero."""
    adapter = fused.module("nodes.native.adapter")
    config, state = fused.adapter()
    plain = fused.plain_model()
    untrained = adapter.apply_adapter(plain, config, zeroed(state), chunk_size=100)
    encoded = fused.encode(fused.flow(3))
    assert torch.equal(fused.sample(encoded, untrained), fused.sample(encoded, plain))


def test_adapter_strength_zero_is_the_model_without_it(rig):
    adapter = rig.module("nodes.native.adapter")
    plain = rig.plain_model()
    config, state = rig.adapter()
    encoded = rig.encode(rig.flow(3))
    off = adapter.apply_adapter(plain, config, state, strength=0.0, chunk_size=100)
    on = adapter.apply_adapter(plain, config, state, strength=1.0)
    assert torch.equal(rig.sample(encoded, off), rig.sample(encoded, plain))
    assert relative(rig.sample(encoded, on), rig.sample(encoded, plain)) > 1e-3


def test_the_model_that_comes_in_stays_as_it_was(rig):
    plain = rig.plain_model()
    encoded = rig.encode(rig.flow(2))
    before = rig.sample(encoded, plain)
    (patched,) = rig.run_adapter(plain)
    rig.sample(encoded, patched)
    assert torch.equal(rig.sample(encoded, plain), before)
    assert not plain.wrappers and not plain.additional_models


def test_applying_twice_replaces(rig):
    plain = rig.plain_model()
    encoded = rig.encode(rig.flow(2))
    (once,) = rig.run_adapter(plain)
    (twice,) = rig.run_adapter(once)
    assert torch.equal(rig.sample(encoded, twice), rig.sample(encoded, once))


def test_a_model_without_adapter_ignores_the_flow(rig):
    plain = rig.plain_model()
    one = rig.sample(rig.encode(rig.flow(3, seed=1)), plain)
    other = rig.sample(rig.encode(rig.flow(3, seed=2)), plain)
    assert torch.equal(one, other)


def test_conditioning_without_flow_is_the_null_label(rig):
    """As it is with strength 0."""
    positive, negative, latent = rig.encode(rig.flow(3), strength=0.0)
    none = rig.sample((rig.prompt(), rig.prompt(""), latent))
    assert relative(rig.sample((positive, negative, latent)), none) < 1e-6
    assert relative(rig.sample(rig.encode(rig.flow(3))), none) > 1e-3


def test_zero_flow_is_not_the_null_label(rig):
    still = rig.sample(rig.encode(rig.equal_flow(2)))
    null = rig.sample(rig.encode(rig.equal_flow(2), strength=0.0))
    assert relative(still, null) > 1e-3


def test_strength_goes_from_the_null_label_to_the_flow(rig):
    def at(strength):
        return rig.sample(rig.encode(rig.flow(3), strength=strength), steps=1, cfg=1.0)

    assert relative(at(0.0), at(1.0)) > relative(at(0.7), at(1.0)) > 1e-4


def test_guide_flow_gives_the_negative_the_null_label(rig):
    label = rig.module("nodes.native.labels").LABEL
    flow = rig.flow(3)
    guided, unguided = (rig.encode(flow, guide_flow=guide) for guide in ("on", "off"))
    assert guided[0][0][1][label].flow is flow and guided[1][0][1][label] is None
    assert unguided[1][0][1][label].flow is flow
    assert relative(rig.sample(guided), rig.sample(unguided)) > 1e-3


def test_only_the_positive_or_only_the_negative_has_flow(rig):
    made = []
    for flow in (rig.flow(3), rig.equal_flow(3)):
        positive, _, latent = rig.encode(flow)
        _, negative, _ = rig.encode(flow, guide_flow="off")
        for conditioning in ((positive, rig.prompt("")), (rig.prompt(), negative)):
            made.append(rig.sample((*conditioning, latent)))
            assert torch.isfinite(made[-1]).all() and made[-1].shape[0] == 3
    assert relative(made[0], made[2]) > 1e-4
    assert relative(made[1], made[3]) > 1e-4


def test_a_step_is_one_call_with_and_without_flow(rig):
    """Core puts positive and negative side by side only if both carry the same conditions."""
    encoded = rig.encode(rig.flow(2))
    batches = []
    model = rig.loaded.model.clone()
    model.set_model_unet_function_wrapper(
        lambda call, given: (
            batches.append(len(given["cond_or_uncond"])),
            call(given["input"], given["timestep"], **given["c"]),
        )[1]
    )
    rig.sample(encoded, model)
    assert batches == [2, 2]


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_frames_follow_their_own_flow(rig, frames):
    """Each frame comes out as it does alone, whatever its neighbours do."""
    flow = rig.flow(frames, seed=3)
    clip = rig.sample(rig.encode(flow))
    assert clip.shape[0] == frames
    kind = type(flow)
    for frame in {0, frames // 2, frames - 1}:
        # Frame 1 of a field is all zeros, so a frame can only be alone behind one.
        alone = kind(flow.displacement[[0, frame]], flow.occlusion[[0, frame]])
        assert relative(clip[[0, frame]], rig.sample(rig.encode(alone))) < 1e-4


def test_any_size(rig):
    clip = rig.sample(rig.encode(rig.flow(3, height=120, width=96)))
    assert clip.shape == (3, 4, 15, 12)
    with torch.inference_mode():
        assert rig.loaded.vae.decode(clip).shape == (3, 120, 96, 3)


@pytest.mark.parametrize(
    ("inputs", "size"),
    [({}, (9, 9)), ({"width": 128}, (9, 16)), ({"width": 96, "height": 32}, (4, 12))],
)
def test_latents_have_the_size_of_the_flow_or_the_one_asked_for(rig, inputs, size):
    _, _, latent = rig.encode(rig.flow(4, height=65, width=70), **inputs)
    assert latent["samples"].shape == (4, 4, *size)
    assert not latent["samples"].any()


def test_the_result_does_not_depend_on_the_size_of_the_flow(rig):
    """Displacement counts in half-frames: the same motion, given larger, is the same label."""
    small = rig.flow(3, height=64, width=64)
    everywhere = small.displacement[..., :1, :1].expand(-1, -1, 64, 64).contiguous()
    small = type(small)(everywhere, small.occlusion)
    large = small.resize(128, 128)
    one = rig.sample(rig.encode(small))
    other = rig.sample(rig.encode(large, width=64, height=64))
    assert relative(other, one) < 1e-5


def test_prompts_longer_than_77_tokens(fused):
    long = " ".join(["a man in a red shirt is walking"] * 30)
    prompt = fused.prompt(long)
    assert prompt[0][0].shape[1] > 77
    flow = fused.flow(3)
    out = fused.sample(fused.encode(flow, prompt=long))
    assert torch.isfinite(out).all()
    # Two pieces against one, and against three: core repeats the shorter one.
    longer = fused.encode(flow, positive=prompt, negative=fused.prompt(long * 2))
    assert torch.isfinite(fused.sample(longer)).all()


def test_a_prompt_repeated_whole_is_the_same_prompt(fused):
    """Flow tokens repeat along with the text's, so padding by repetition changes nothing."""
    text, pooled = fused.prompt()[0]
    flow = fused.flow(3)
    doubled = [[text.repeat(1, 2, 1), pooled]]
    once = fused.sample(fused.encode(flow))
    assert relative(fused.sample(fused.encode(flow, positive=doubled)), once) < 1e-5


def test_start_and_end(rig):
    flow = rig.flow(3)
    full = rig.sample(rig.encode(flow), steps=4)
    null = rig.sample(rig.encode(flow, strength=0.0), steps=4)

    def between(start, end):
        return rig.sample(rig.encode(flow, start_percent=start, end_percent=end), steps=4)

    assert torch.equal(between(0.0, 1.0), full)
    assert relative(between(0.0, 0.0), null) < 1e-6
    early, late = between(0.0, 0.5), between(0.5, 1.0)
    assert all(relative(part, whole) > 1e-4 for part in (early, late) for whole in (full, null))


def test_mask(rig):
    """A mask of ones is no mask, a mask of zeros the null label, and half a mask is between."""
    flow = rig.flow(3)
    full = rig.sample(rig.encode(flow))
    null = rig.sample(rig.encode(flow, strength=0.0))
    ones = torch.ones(1, 64, 64)
    half = ones.clone()
    half[:, :, 32:] = 0
    assert relative(rig.sample(rig.encode(flow, mask=ones)), full) < 1e-5
    assert relative(rig.sample(rig.encode(flow, mask=0 * ones)), null) < 1e-5
    masked = rig.sample(rig.encode(flow, mask=half))
    assert relative(masked, full) > 1e-4 and relative(masked, null) > 1e-4


def test_a_mask_a_frame(rig):
    flow = rig.flow(3)
    full = rig.sample(rig.encode(flow))
    null = rig.sample(rig.encode(flow, strength=0.0))
    masks = torch.zeros(3, 32, 32)
    masks[1] = 1
    out = rig.sample(rig.encode(flow, mask=masks))
    assert relative(out[1:2], full[1:2]) < 1e-5
    assert relative(out[[0, 2]], null[[0, 2]]) < 1e-5


def with_area(conditioning, *area):
    return [[text, {**rest, "area": area}] for text, rest in conditioning]


def test_an_area_sees_its_part_of_the_flow(rig):
    """An area conditioned alone is the clip of that size with the flow cropped to it."""
    flow = rig.flow(3, height=64, width=128)
    positive, negative, latent = rig.encode(flow)
    right = type(flow)(
        flow.displacement[..., 64:].contiguous(), flow.occlusion[..., 64:].contiguous()
    )
    whole = rig.sample((with_area(positive, 8, 8, 0, 8), negative, latent), steps=1, cfg=1.0)
    noise = rig.module("nodes.native.noise").SharedNoise(7).generate_noise(latent)
    alone = rig.sample_noise(rig.encode(right), noise[..., 8:], steps=1, cfg=1.0)
    assert relative(whole[..., 8:], alone) < 1e-5


def test_areas_in_percent_and_areas_of_the_negative(rig):
    positive, negative, latent = rig.encode(rig.flow(3, height=64, width=128))
    right = with_area(positive, 8, 8, 0, 8)

    def with_left(part):
        return [[text, {**rest, "area": part}] for text, rest in positive] + right

    percent = rig.sample((with_left(("percentage", 1.0, 0.5, 0.0, 0.0)), negative, latent))
    assert torch.equal(percent, rig.sample((with_left((8, 8, 0, 0)), negative, latent)))
    usual = rig.sample((positive, negative, latent))
    assert relative(percent, usual) > 1e-4
    other = rig.prompt("a woman in blue")
    changed = rig.sample((positive, negative + with_area(other, 8, 8, 0, 0), latent))
    assert torch.isfinite(changed).all()
    assert relative(changed[..., :8], usual[..., :8]) > 1e-4


def test_two_flows_in_one_prompt(rig):
    """Combined conditioning: each entry keeps its own flow."""
    one, negative, latent = rig.encode(rig.flow(3, seed=1))
    two, _, _ = rig.encode(rig.flow(3, seed=2))
    both = rig.sample((one + two, negative, latent), steps=1, cfg=1.0)
    mean = (
        rig.sample((one, negative, latent), steps=1, cfg=1.0)
        + rig.sample((two, negative, latent), steps=1, cfg=1.0)
    ) / 2
    assert relative(both, mean) < 1e-4


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_a_flow_of_another_number_of_frames_is_refused(rig, frames):
    positive, negative, _ = rig.encode(rig.flow(4))
    latent = {"samples": torch.zeros(frames, 4, 8, 8)}
    with pytest.raises(ValueError, match=rf"expected a flow of {frames} frames.*got 4"):
        rig.sample((positive, negative, latent))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent of at most end_percent"),
        ({"mask": torch.ones(3, 8, 8)}, "one for each of the 4 frames"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(rig, inputs, message):
    with pytest.raises(ValueError, match=f"^Encode Flow .S2DM.: .*{message}"):
        rig.encode(rig.flow(4), **inputs)
