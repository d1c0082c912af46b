"""A clip anchored to its first frame: on any model, with every sampler, in any size."""

from __future__ import annotations

import pytest
import torch
from compare import relative

pytestmark = pytest.mark.comfyui

FRAMES = 4


@pytest.fixture(scope="module")
def picture():
    """(1, 64, 64, 3): an IMAGE with something to see in it."""
    ramp = torch.linspace(0, 1, 64)
    waves = 0.5 + 0.5 * torch.sin(20 * ramp)
    return torch.stack(
        [ramp.expand(64, 64), ramp[:, None].expand(64, 64), waves.expand(64, 64)], dim=-1
    )[None]


@pytest.fixture(scope="module")
def encoded(rig):
    return rig.encode(rig.flow(FRAMES))


def anchored(rig, picture, flow, model=None, **inputs):
    inputs = {"reference_attention": "off", **inputs}
    model = rig.loaded.model if model is None else model
    return rig.run(
        "S2DMAnchorToReference",
        model=model,
        vae=rig.loaded.vae,
        reference=picture,
        flow=flow,
        **inputs,
    )[0]


def latent_of(rig, picture):
    with torch.inference_mode():
        return rig.loaded.vae.encode(picture)


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"end_percent": 0.0}])
def test_an_anchor_that_is_off_changes_no_bit(rig, picture, encoded, off):
    model = anchored(rig, picture, rig.flow(FRAMES), **off)
    assert model is rig.loaded.model
    assert torch.equal(rig.sample(encoded, model), rig.sample(encoded))


def test_the_model_itself_stays_as_it_is(rig, picture, encoded):
    before = rig.sample(encoded)
    clip = rig.sample(encoded, anchored(rig, picture, rig.flow(FRAMES)))
    assert relative(clip, before) > 0.05
    assert torch.equal(rig.sample(encoded), before)


@pytest.mark.parametrize("adapter", [True, False])
def test_frame_1_is_the_picture(rig, picture, encoded, adapter):
    model = None if adapter else rig.plain_model()
    clip = rig.sample(encoded, anchored(rig, picture, rig.flow(FRAMES), model), steps=3)
    assert relative(clip[:1], latent_of(rig, picture)) < 1e-3
    assert relative(clip[1:2], latent_of(rig, picture)) > 0.05


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_without_a_picture_frame_1_is_drawn_first(rig, encoded, adapter, late):
    """And is what the model draws by itself, whichever of the nodes comes first."""
    model = rig.loaded.model if adapter else rig.plain_model()
    one = rig.sample(rig.encode(rig.flow(FRAMES).select([0])), model, steps=3)
    with torch.inference_mode():
        drawn = rig.loaded.vae.decode(one)
    expected = rig.sample(encoded, anchored(rig, drawn, rig.flow(FRAMES), model), steps=3)
    held = anchored(rig, None, rig.flow(FRAMES), rig.plain_model() if late else model)
    if late and adapter:
        held = rig.run_adapter(held)[0]
    clip = rig.sample(encoded, held, steps=3)
    assert relative(clip, expected) < 1e-4
    assert torch.equal(rig.sample(encoded, held, steps=3), clip)


def test_frames_follow_the_flow(rig, picture):
    """Anchored to the end, a frame is the picture moved, where the picture shows it."""
    flow = rig.equal_flow(2)
    flow.displacement[1, 0] = -16  # from the left, so the picture has moved to the right
    model = anchored(rig, picture, flow, rig.plain_model(), end_percent=1.0)
    clip = rig.sample(rig.encode(flow), model, steps=6)
    moved = latent_of(rig, picture.roll(16, dims=2))
    assert relative(clip[1:, ..., 3:-1], moved[..., 3:-1]) < 0.25


def test_the_reference_is_encoded_once(rig, picture, encoded, monkeypatch):
    """Another seed samples from the same anchor, another size doesn't."""
    model = anchored(rig, picture, rig.flow(FRAMES))
    seen = []
    encode = rig.loaded.vae.encode

    def counted(pixels):
        seen.append(tuple(pixels.shape))
        return encode(pixels)

    monkeypatch.setattr(rig.loaded.vae, "encode", counted)
    rig.sample(encoded, model)
    assert seen == [(1, 64, 64, 3)] * FRAMES
    rig.sample(encoded, model, seed=8)
    rig.sample(encoded, model.clone(), seed=9)
    assert len(seen) == FRAMES
    rig.sample(rig.encode(rig.flow(FRAMES), width=32, height=32), model)
    assert seen[FRAMES:] == [(1, 32, 32, 3)] * FRAMES


def test_chunks_are_exact(rig, picture):
    apply_adapter = rig.module("nodes.native.adapter").apply_adapter
    flow = rig.flow(5)
    encoded = rig.encode(flow)

    def sample(size, attention="off"):
        model = apply_adapter(rig.plain_model(), *rig.adapter(), chunk_size=size)
        model = anchored(rig, picture, flow, model, reference_attention=attention)
        return rig.sample(encoded, model, steps=3)

    assert relative(sample(2), sample(100)) < 1e-5
    assert relative(sample(2, "on"), sample(100, "on")) < 1e-5
    assert relative(sample(100, "on"), sample(100)) > 1e-4


def chunks_seen(model, sample):
    seen = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[0])
    )
    try:
        sample(model)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("order", ["adapter first", "anchor first", "anchor twice"])
def test_adapter_and_anchor_cut_the_frames_once(rig, picture, encoded, order):
    apply_adapter = rig.module("nodes.native.adapter").apply_adapter
    flow = rig.flow(FRAMES)

    def adapted(model):
        return apply_adapter(model, *rig.adapter(), chunk_size=3)

    model = rig.plain_model()
    if order == "anchor first":
        model = adapted(anchored(rig, picture, flow, model, reference_attention="on"))
    else:
        model = anchored(rig, picture, flow, adapted(model), reference_attention="on")
    if order == "anchor twice":
        model = anchored(rig, 1 - picture, flow, model, reference_attention="on")
    # Positive and negative side by side, two steps.
    assert chunks_seen(model, lambda model: rig.sample(encoded, model)) == [4, 4] * 2
    usual = anchored(rig, picture, flow, adapted(rig.plain_model()), reference_attention="on")
    same = relative(rig.sample(encoded, model), rig.sample(encoded, usual)) < 1e-5
    assert same == (order != "anchor twice")


def test_without_an_adapter_frames_come_in_chunks_too(rig, picture, encoded, monkeypatch):
    chunks = rig.module("nodes.native.chunks")
    monkeypatch.setattr(chunks, "frames_at_once", lambda *args: 3)
    model = anchored(rig, picture, rig.flow(FRAMES), rig.plain_model())
    # The flow acts through the anchor alone, so frames are equal until it has pulled them apart.
    seen = chunks_seen(model, lambda model: rig.sample(encoded, model, steps=3))
    assert seen == [2] + [4, 4] * 2


@pytest.mark.slow
def test_zero_flow_gives_frame_1_in_every_frame(rig, picture):
    import comfy.samplers

    flow = rig.equal_flow(3)
    encoded = rig.encode(flow)
    model = anchored(rig, picture, flow, reference_attention="on")
    expected = latent_of(rig, picture)
    far = {}
    for name in comfy.samplers.KSampler.SAMPLERS:
        clip = rig.sample(encoded, model, steps=3, sampler_name=name)
        assert torch.equal(clip, clip[:1].expand_as(clip)), name
        # These two of core stop where there is still some noise.
        allowed = 0.15 if name in ("dpm_fast", "dpm_adaptive") else 0.02
        if relative(clip[:1], expected) > allowed:
            far[name] = relative(clip[:1], expected)
    assert not far


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_other_predictions(rig, picture, encoded, prediction):
    from comfy_extras import nodes_model_advanced as core

    kind, node = {
        "v_prediction": ("v_prediction", core.ModelSamplingDiscrete),
        "flow": ("flow", core.ModelSamplingSD3),
    }[prediction]
    plain = rig.plain_model()
    if prediction == "flow":
        model = node().patch(plain, shift=3.0)[0]
    else:
        model = node().patch(plain, sampling=kind, zsnr=False)[0]
    scheduler = {"scheduler": "simple", "sampler_name": "euler"}
    clip = rig.sample(
        encoded, anchored(rig, picture, rig.flow(FRAMES), model), steps=4, **scheduler
    )
    assert relative(clip[:1], latent_of(rig, picture)) < 1e-3
    assert relative(clip, rig.sample(encoded, model, steps=4, **scheduler)) > 0.05


def test_denoise_below_1_and_a_mask(rig, picture, encoded):
    """Frame 1 is the picture where the mask lets the sampler paint, and what it was elsewhere."""
    positive, negative, latent = encoded
    samples = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    latent = {"samples": samples, "noise_mask": mask}
    model = anchored(rig, picture, rig.flow(FRAMES))
    clip = rig.sample((positive, negative, latent), model, steps=3, denoise=0.6)
    assert relative(clip[:1, ..., 4:], latent_of(rig, picture)[..., 4:]) < 0.02
    assert relative(clip[..., :4], samples[..., :4]) < 1e-3


def test_strength_is_a_share(rig, picture, encoded):
    flow, expected = rig.flow(FRAMES), latent_of(rig, picture)

    def far(strength):
        clip = rig.sample(encoded, anchored(rig, picture, flow, strength=strength))
        return relative(clip[:1], expected)

    assert far(1.0) < far(0.5) < far(0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.repeat(3, 1, 1, 1),
        lambda image: torch.cat([image, torch.rand(1, 64, 64, 1)], dim=-1),
    ],
    ids=["batch", "alpha"],
)
def test_the_first_picture_counts_without_alpha(rig, picture, encoded, change):
    flow = rig.flow(FRAMES)
    usual = rig.sample(encoded, anchored(rig, picture, flow))
    assert torch.equal(rig.sample(encoded, anchored(rig, change(picture), flow)), usual)


def test_a_grey_picture(rig, picture, encoded):
    flow, grey = rig.flow(FRAMES), picture[..., :1]
    three = rig.sample(encoded, anchored(rig, grey.expand(-1, -1, -1, 3), flow))
    assert torch.equal(rig.sample(encoded, anchored(rig, grey, flow)), three)


def test_a_picture_of_another_size(rig, picture, encoded):
    """The same shape in any size; the flow too."""
    flow = rig.flow(FRAMES)
    usual = rig.sample(encoded, anchored(rig, picture, flow))
    larger = picture.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert relative(rig.sample(encoded, anchored(rig, larger, flow)), usual) < 1e-4
    clip = rig.sample(encoded, anchored(rig, picture, flow.resize(192, 192)))
    assert relative(clip, usual) < 0.1


def test_sizes_between_cells(rig):
    """As Encode Flow fills the last cells."""
    flow = rig.flow(2, 60, 44)
    clip = rig.sample(rig.encode(flow), anchored(rig, torch.rand(1, 60, 44, 3), flow))
    assert clip.shape == (2, 4, 8, 6)


def test_one_frame(rig, picture):
    flow = rig.flow(1)
    clip = rig.sample(rig.encode(flow), anchored(rig, picture, flow))
    assert relative(clip, latent_of(rig, picture)) < 1e-3


def test_a_flow_that_leaves_the_picture(rig, picture):
    flow = rig.equal_flow(2)
    flow.displacement[1] = 500
    clip = rig.sample(rig.encode(flow), anchored(rig, picture, flow))
    # Nothing of frame 2 is anchored.
    assert clip.isfinite().all()
    assert relative(clip[1:], rig.sample(rig.encode(flow))[1:]) < 1e-4


@pytest.mark.parametrize(
    "reference, message",
    [
        (torch.full((1, 64, 64, 3), torch.nan), r"aren't finite\. The node before"),
        (torch.rand(1, 64, 96, 3), r"expected the reference in the shape of the flow, 64x64, got"),
        (torch.rand(1, 64, 64, 2), r"reference: expected an image .* got \(1, 64, 64, 2\)"),
        (torch.rand(0, 64, 64, 3), r"reference: expected an image .* got \(0, 64, 64, 3\)"),
    ],
    ids=["nan", "shape", "channels", "empty"],
)
def test_what_is_no_reference(rig, reference, message):
    with pytest.raises(ValueError, match=r"^Anchor to Reference \(S2DM\): .*" + message):
        anchored(rig, reference, rig.flow(2))


def test_frames_that_do_not_match(rig, picture, encoded):
    model = anchored(rig, picture, rig.flow(3))
    expected = rf"Anchor to Reference \(S2DM\): expected a flow of {FRAMES} frames.* got 3\."
    with pytest.raises(ValueError, match=expected):
        rig.sample(encoded, model)


def test_latents_in_another_shape(rig, picture):
    model = anchored(rig, picture, rig.flow(2))
    with pytest.raises(ValueError, match=r"flow in the shape of the latents, 96x64, got 64x64"):
        rig.sample(rig.encode(rig.flow(2, 64, 96)), model)


def test_a_vae_of_another_model(rig, picture, encoded, monkeypatch):
    model = anchored(rig, picture, rig.flow(FRAMES))
    monkeypatch.setattr(rig.loaded.vae, "encode", lambda pixels: torch.zeros(1, 16, 8, 8))
    expected = r"encodes the reference to the MODEL's latents \(4, 8, 8\), got \(16, 8, 8\)"
    with pytest.raises(ValueError, match=expected):
        rig.sample(encoded, model)


def test_a_sampler_that_changes_the_size(rig, picture):
    core = pytest.importorskip("comfy_extras.nodes_advanced_samplers")
    import comfy.samplers

    flow = rig.flow(2)
    positive, negative, latent = rig.encode(flow)
    model = anchored(rig, picture, flow)
    sampler = comfy.samplers.KSAMPLER(
        core.sample_lcm_upscale, {"total_upscale": 2.0, "upscale_steps": 1}
    )
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    with pytest.raises(ValueError, match="expected a sampler that keeps the size"):
        rig.sample_guided(guider, sampler, sigmas, latent)


def test_the_next_run_works_after_a_failed_one(rig, picture, encoded, monkeypatch):
    flow = rig.flow(FRAMES)
    usual = rig.sample(encoded, anchored(rig, picture, flow))
    model = anchored(rig, picture, flow)
    with monkeypatch.context() as patch:
        patch.setattr(rig.loaded.vae, "encode", lambda pixels: torch.zeros(1, 16, 8, 8))
        with pytest.raises(ValueError):
            rig.sample(encoded, model)
    assert torch.equal(rig.sample(encoded, model), usual)


def test_a_run_that_is_cancelled_while_encoding_costs_the_next_one_nothing(
    rig, picture, encoded, monkeypatch
):
    flow = rig.flow(FRAMES)
    model = anchored(rig, picture, flow)
    before = rig.sample(encoded, model)

    def cancelled(pixels):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rig.loaded.vae, "encode", cancelled)
        with pytest.raises(KeyboardInterrupt):
            rig.sample(rig.encode(flow.resize(128, 128)), model)
    assert torch.equal(rig.sample(encoded, model), before)
