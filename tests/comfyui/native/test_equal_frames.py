"""Frames that are equal are computed once, and give what they give one by one."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from core_nodes import core_node

pytestmark = pytest.mark.comfyui

FRAMES = 4


def rows(model, sample):
    """How many rows each call of the U-Net has."""
    seen = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, arguments: seen.append(len(arguments[0]))
    )
    try:
        clip = sample(model)
    finally:
        handle.remove()
    return seen, clip


@pytest.fixture
def one_by_one(rig, monkeypatch):
    """Sampling without the shortcut."""

    def sample(*args, **inputs):
        with monkeypatch.context() as patch:
            frames = rig.module("nodes.native.frames")
            patch.setattr(frames, "one_of_equal", lambda *args: None)
            return rig.sample(*args, **inputs)

    return sample


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde", "heun"])
def test_a_clip_that_does_not_move_is_one_frame(rig, one_by_one, sampler):
    encoded = rig.encode(rig.equal_flow(FRAMES))
    seen, clip = rows(
        rig.loaded.model, lambda model: rig.sample(encoded, model, sampler_name=sampler)
    )
    assert set(seen) == {2}  # the prompt and the negative one
    assert torch.equal(clip, clip[:1].expand_as(clip))
    assert relative(clip, one_by_one(encoded, sampler_name=sampler)) < 1e-5


def test_frames_are_one_until_the_flow_acts(rig, one_by_one):
    encoded = rig.encode(rig.flow(FRAMES), start_percent=0.5)
    seen, clip = rows(rig.loaded.model, lambda model: rig.sample(encoded, model, steps=4))
    assert seen[0] == 2 and seen[-1] == 2 * FRAMES
    assert seen == sorted(seen)
    assert relative(clip, one_by_one(encoded, steps=4)) < 1e-5


def test_equal_noise_is_not_enough(rig):
    """Another flow, another mask or another latent makes another frame."""
    positive, negative, _ = rig.encode(rig.equal_flow(FRAMES))
    mask = torch.zeros(FRAMES, 64, 64)
    mask[1] = 1
    moving = rig.equal_flow(FRAMES)
    moving.displacement[2] = 3
    other = {"samples": torch.zeros(FRAMES, 4, 8, 8)}
    other["samples"][3] = 1
    for encoded in (
        rig.encode(moving),
        rig.encode(rig.flow(FRAMES), mask=mask),
        (positive, negative, other),
    ):
        seen, _ = rows(
            rig.loaded.model, lambda model, told=encoded: rig.sample(told, model, denoise=0.5)
        )
        assert set(seen) == {2 * FRAMES}


def test_who_may_tell_frames_apart_sees_them_all(rig):
    """A ControlNet, and whatever patches attention or wraps the U-Net."""
    import comfy.controlnet
    from comfy.patcher_extension import WrappersMP

    encoded = rig.encode(rig.equal_flow(FRAMES))
    positive, negative, latent = encoded

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            ramp = torch.arange(1.0, len(x_noisy) + 1).view(-1, 1, 1, 1)
            return {"middle": [ramp.expand(-1, 64, 4, 4)], "output": [], "input": []}

        def get_models(self):
            return []

    control = [[text, {**rest, "control": Control()}] for text, rest in positive]
    patched = rig.loaded.model.clone()
    patched.set_model_attn2_patch(lambda n, context, value, extra: (n, context, value))
    wrapped = rig.loaded.model.clone()
    wrapped.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *args, **more: executor(*args, **more)
    )
    freed = core_node("nodes_freelunch", "FreeU", rig.loaded.model, b1=1.1, b2=1.2, s1=0.9, s2=0.2)
    for told, model in (
        ((control, negative, latent), rig.loaded.model),
        (encoded, patched),
        (encoded, wrapped),
        (encoded, freed),
    ):
        seen, _ = rows(model, lambda model, told=told: rig.sample(told, model))
        # Core calls with a ControlNet's condition alone.
        assert max(seen) >= FRAMES


def test_frames_with_numbers_that_are_none_run(rig):
    """NaN equals nothing, so such frames are not taken for one."""
    chunks = rig.module("nodes.native.chunks")
    latents = torch.full((2, 1), torch.nan)
    assert chunks.one_of_equal(lambda x, frames: x, 1, latents, {}) is None


def test_conditions_may_differ_from_one_another(rig):
    chunks = rig.module("nodes.native.chunks")

    def call(x, frames, y):
        assert frames == range(1)
        return x + y["rows"]

    latents = torch.tensor([1.0, 1.0, 5.0, 5.0])[:, None]
    y = {"rows": torch.tensor([2.0, 2.0, 3.0, 3.0])[:, None], "other": torch.arange(3)}
    out = chunks.one_of_equal(call, 2, latents, {"y": y})
    assert out[:, 0].tolist() == [3, 3, 8, 8]
    y["rows"] = torch.arange(4.0)[:, None]
    assert chunks.one_of_equal(call, 2, latents, {"y": y}) is None
