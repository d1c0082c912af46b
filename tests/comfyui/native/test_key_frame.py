"""Anchor to Reference's key_frame: the frame that moves most, drawn before frame 1."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from random_checkpoint import tiny_config, write_random_checkpoint

pytestmark = pytest.mark.comfyui

FRAMES, KEY = 4, 2


@pytest.fixture(scope="module")
def flow(rig):
    flow = rig.flow(FRAMES)
    flow.displacement[KEY] = flow.displacement[KEY] * 2
    return flow


@pytest.fixture(scope="module")
def encoded(rig, flow):
    return rig.encode(flow)


@pytest.fixture(scope="module")
def off(rig, flow, encoded):
    """Latents of the same clip without a key frame."""
    return rig.sample(encoded, anchored(rig, flow, "off"))


def anchored(rig, flow, key_frame="on", model=None, **inputs):
    return rig.run(
        "S2DMAnchorToReference",
        model=rig.loaded.model if model is None else model,
        vae=rig.loaded.vae,
        flow=flow,
        key_frame=key_frame,
        **{"reference_attention": "off", **inputs},
    )[0]


def decoded(rig, latents):
    with torch.inference_mode():
        return rig.loaded.vae.decode(latents)


@pytest.mark.parametrize("late", [True, False])
def test_key_frame_then_frame_1_then_the_clip(rig, flow, late):
    """As with other nodes by hand, whichever of anchor and adapter comes first."""
    encoded = rig.encode(flow, start_percent=0.5)
    key = rig.sample(rig.encode(flow, start_percent=0.0), steps=4)[KEY:][:1]
    moved = rig.module("s2dm.flow.inverse").rebase(flow, [KEY, 0])
    held = anchored(rig, moved, "off", reference=decoded(rig, key))
    still = rig.encode(rig.equal_flow(2), start_percent=0.5)
    frame_1 = decoded(rig, rig.sample(still, held, steps=4)[1:])
    by_hand = rig.sample(encoded, anchored(rig, flow, reference=frame_1), steps=4)

    model = anchored(rig, flow, model=rig.plain_model() if late else None)
    if late:
        model = rig.run_adapter(model)[0]
    clip = rig.sample(encoded, model, steps=4)
    assert relative(clip, by_hand) < 1e-4
    assert relative(clip, rig.sample(encoded, anchored(rig, flow, "off"), steps=4)) > 0.01
    assert torch.equal(rig.sample(encoded, model, steps=4), clip)


def nothing_says_flow(rig, flow):
    positive, negative, latent = rig.prompt(), rig.prompt(""), rig.encode(flow)[2]
    return (positive, negative, latent), {}


def another_reference(rig, flow):
    return rig.encode(flow), {"reference": torch.rand(1, 64, 64, 3)}


def no_adapter(rig, flow):
    return rig.encode(flow), {"model": rig.plain_model()}


def no_strength(rig, flow):
    return rig.encode(flow, strength=0.0), {}


def a_control_net(rig, flow):
    """It says where things stand, and its picture may be that of frame 1."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, *args):
            return None

    positive, negative, latent = rig.encode(flow)
    positive = [[text, {**rest, "control": Control()}] for text, rest in positive]
    return (positive, negative, latent), {}


@pytest.mark.parametrize(
    "case", [nothing_says_flow, another_reference, no_adapter, no_strength, a_control_net]
)
def test_where_flow_does_not_place_anybody_no_bit_changes(rig, flow, case):
    encoded, inputs = case(rig, flow)
    clips = [rig.sample(encoded, anchored(rig, flow, key, **inputs)) for key in ("on", "off")]
    assert torch.equal(*clips)


def test_where_nothing_moves_no_bit_changes(rig):
    flow = rig.equal_flow(3)
    encoded = rig.encode(flow)
    clips = [rig.sample(encoded, anchored(rig, flow, key)) for key in ("on", "off")]
    assert torch.equal(*clips)


def test_auto_is_as_the_checkpoint_recommends(rig, flow, encoded, off, tmp_path):
    for wanted in (True, False):
        advice = {"anchor_end": 1.0, "key_frame": wanted}
        config = tiny_config(flow_generator=None).recommending(advice)
        path = write_random_checkpoint(tmp_path / f"{wanted}.safetensors", config)
        advised = type(rig)(rig.pack, rig.nodes, path)
        clip = rig.sample(encoded, anchored(advised, flow, "auto"))
        assert (relative(clip, off) < 1e-5) == (not wanted)
        told = rig.sample(encoded, anchored(advised, flow, "on" if wanted else "off"))
        assert torch.equal(clip, told)
    # The tiny checkpoint recommends nothing.
    assert torch.equal(rig.sample(encoded, anchored(rig, flow, "auto")), off)


def test_masks_of_the_flow_and_of_the_noise_are_those_of_the_key_frame(rig, flow):
    """Of a mask for each frame. What the noise mask keeps out stays as it was."""
    samples = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen, painted = torch.ones(FRAMES, 64, 64), torch.ones(FRAMES, 1, 8, 8)
    painted[..., :2] = 0
    model = anchored(rig, flow)

    def clip(seen, painted):
        positive, negative, _ = rig.encode(flow, mask=seen)
        latent = {"samples": samples, "noise_mask": painted}
        return rig.sample((positive, negative, latent), model)

    usual = clip(seen, painted)
    assert relative(usual[..., :2], samples[..., :2]) < 1e-3
    # Frame 1 shows what the key frame was told, and it alone of the others.
    for mask, part in ((seen, (slice(None), slice(None))), (painted, (..., slice(4, 8)))):
        for frame in (KEY, KEY + 1):
            changed = mask.clone()
            changed[frame][part] = 0
            other = clip(changed, painted) if mask is seen else clip(seen, changed)
            assert (relative(other[:1], usual[:1]) > 1e-4) == (frame == KEY)


@pytest.mark.parametrize("late", [True, False])
def test_flow_of_another_number_of_frames(rig, flow, late):
    """Said before a frame is drawn that the conditioning doesn't have."""
    positive, negative, _ = rig.encode(rig.flow(2))
    model = anchored(rig, flow, model=rig.plain_model() if late else None)
    model = rig.run_adapter(model)[0] if late else model
    latent = {"samples": torch.zeros(FRAMES, 4, 8, 8)}
    with pytest.raises(ValueError, match=rf"expected a flow of {FRAMES} frames.* got 2\."):
        rig.sample((positive, negative, latent), model)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_run_that_is_cancelled_leaves_no_anchor_behind(rig, flow, encoded, call):
    """In the key frame, and in frame 1, which is anchored to it; two steps each."""
    usual = rig.sample(encoded, anchored(rig, flow))
    model = anchored(rig, flow)
    calls = []

    def cancel(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = model.model.diffusion_model.register_forward_pre_hook(cancel)
    with pytest.raises(KeyboardInterrupt):
        rig.sample(encoded, model)
    handle.remove()
    assert torch.equal(rig.sample(encoded, model), usual)
