"""Frames in chunks give the same clip, whatever else takes part."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.comfyui


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def with_chunks(rig, frames):
    apply_adapter = rig.module("nodes.native.adapter").apply_adapter
    return apply_adapter(rig.plain_model(), *rig.adapter(), frames=frames)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_chunks_are_exact(rig, size):
    flow = rig.flow(7)
    encoded = rig.encode(flow, mask=torch.rand(7, 16, 16), end_percent=0.6)
    whole = rig.sample(encoded, with_chunks(rig, 100))
    assert relative(rig.sample(encoded, with_chunks(rig, size)), whole) < 1e-5


def test_one_chunk_for_all_frames_is_no_chunk(rig):
    encoded = rig.encode(rig.flow(4))
    whole = rig.sample(encoded, with_chunks(rig, 100))
    assert torch.equal(rig.sample(encoded, with_chunks(rig, 4)), whole)


def test_the_unet_sees_no_more_frames_than_asked_for(rig):
    seen = []
    model = with_chunks(rig, 3)
    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    try:
        rig.sample(rig.encode(rig.flow(8)), model)
    finally:
        handle.remove()
    # Positive and negative side by side, two steps.
    assert seen == [6, 6, 4] * 2


@pytest.mark.parametrize("free, expected", [(0, 1), (99, 1), (1000, 7), (10**9, 16)])
def test_a_chunk_fits_into_the_memory_that_is_free(rig, monkeypatch, free, expected):
    """A device other than the CPU, with room for a number of frames of 100 bytes."""
    import comfy.model_management

    chunks = rig.module("nodes.native.chunks")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free)
    latents = torch.empty(2 * 16, 4, 8, 8, device="meta")

    def required(shape):
        assert shape == [2, 4, 8, 8]
        return 100

    assert chunks.frames_at_once(None, latents, 2, required) == expected


def test_control_follows_its_frames(rig):
    """What a ControlNet says of a frame stays with the frame."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        """Adds a feature to the middle of the U-Net, another one for each frame."""

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            frames = x_noisy.shape[0] // batched_number
            ramp = torch.arange(1.0, frames + 1).repeat(batched_number).view(-1, 1, 1, 1)
            return {"middle": [ramp.expand(-1, 64, 4, 4)], "output": [], "input": []}

        def get_models(self):
            return []

    positive, negative, latent = rig.encode(rig.flow(5))
    control = [[text, {**rest, "control": Control()}] for text, rest in positive]
    encoded = control, negative, latent
    whole = rig.sample(encoded, with_chunks(rig, 100))
    assert relative(whole, rig.sample((positive, negative, latent))) > 1e-3
    assert relative(rig.sample(encoded, with_chunks(rig, 2)), whole) < 1e-5


def test_a_chunk_that_does_not_fit_is_halved(rig):
    from comfy.model_management import OOM_EXCEPTION

    chunks = rig.module("nodes.native.chunks")
    seen = []

    def call(x, scale):
        seen.append(len(x))
        if len(x) > 4:
            raise OOM_EXCEPTION("out of memory")
        return x * scale

    x = torch.arange(14.0).view(14, 1)
    scale = torch.arange(14.0, 28.0).view(14, 1)
    out = chunks.in_chunks(call, 7, 2, x, {"scale": scale})
    assert torch.equal(out, x * scale)
    assert seen == [14, 6, 2, 2, 2, 2, 2, 2, 2]


def test_out_of_memory_with_one_frame_is_the_end(rig):
    from comfy.model_management import OOM_EXCEPTION

    chunks = rig.module("nodes.native.chunks")

    def call(x):
        raise OOM_EXCEPTION("out of memory")

    with pytest.raises(OOM_EXCEPTION):
        chunks.in_chunks(call, 8, 1, torch.zeros(3, 1), {})


def test_core_is_asked_for_the_memory_of_a_chunk(rig):
    import comfy.model_management

    asked = []
    model = with_chunks(rig, 2)
    estimate = model.model.memory_required
    model.model.memory_required = lambda shape, **rest: (
        asked.append(shape[0]),
        estimate(shape, **rest),
    )[1]
    try:
        rig.sample(rig.encode(rig.flow(9)), model)
    finally:
        del model.model.memory_required
    # The first two are core's, before it loads the model: with and without guidance.
    assert asked[:2] == [4, 2]
    assert comfy.model_management.get_torch_device().type == "cpu"


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still alive; and their peak."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage):
        address = storage.data_ptr()
        if address in self.alive or not storage.nbytes():
            return
        self.alive[address] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self.forget, address)

    def forget(self, address):
        self.now -= self.alive.pop(address, 0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(rig, tmp_path):
    """The peak of the process: 128 frames need at most 1.15 times what 16 do.

    A U-Net of the size of the bundled one, 128x128, chunks of 16. What is in memory before (the
    interpreter, torch, the weights) plus the peak of all that sampling allocates.
    """
    import psutil

    models = rig.module("s2dm.models")
    checkpoint = rig.module("s2dm.models.checkpoint")
    unet = dataclasses.replace(models.PUPPETS.unet, context_dim=64)
    config, states = checkpoint.load_checkpoint(rig.checkpoint)
    layers = models.FlowAdapterConfig.for_unet(unet)
    config = dataclasses.replace(config, unet=unet, flow_adapter=layers)
    keys = rig.module("s2dm.models.keys").unet_keys(unet)
    generator = torch.Generator().manual_seed(0)
    states["unet"] = {
        key.ldm: 0.05 * torch.randn(key.ldm_shape, generator=generator) for key in keys
    }
    states["flow_adapter"] = models.FlowAdapter(layers).state_dict()
    path = tmp_path / "larger.safetensors"
    checkpoint.save_checkpoint(path, config, states)
    model = rig.module("nodes.native.loading").load_all(str(path), frames=16).model

    def peak(frames):
        encoded = rig.encode(rig.flow(frames, height=128, width=128))
        with Allocated() as allocated:
            rig.sample(encoded, model, steps=1)
        return allocated.peak

    peak(1)
    before = psutil.Process().memory_info().rss
    short, long = peak(16), peak(128)
    assert short > 5e7, "most was not counted"
    assert before + long <= 1.15 * (before + short)
    # A frame more is its latents, its label and its prompt, not its way through the U-Net.
    assert (long - short) / 112 < short / 16 / 10
