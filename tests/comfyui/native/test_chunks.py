"""Frames in chunks give the same clip, whatever else takes part."""

from __future__ import annotations

import dataclasses
import inspect
import weakref

import pytest
import torch
from compare import relative
from core_nodes import THINNING, core_node
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.comfyui


def with_chunks(rig, frames):
    apply_adapter = rig.module("nodes.native.adapter").apply_adapter
    return apply_adapter(rig.plain_model(), *rig.adapter(), chunk_size=frames)


def memory_asked_for(model, monkeypatch):
    """The batches for which core asks how much memory they take, as they come."""
    asked = []
    estimate = model.model.memory_required

    def recorded(shape, **rest):
        asked.append(shape[0])
        return estimate(shape, **rest)

    monkeypatch.setattr(model.model, "memory_required", recorded)
    return asked


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


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("free, expected", [(0, 1), (99, 1), (1000, 7), (10**9, 16)])
def test_a_chunk_fits_into_the_memory_that_is_free(rig, monkeypatch, free, expected, device):
    """A device with room for a number of frames of 100 bytes."""
    import comfy.model_management

    chunks = rig.module("nodes.native.chunks")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free)
    latents = torch.empty(2 * 16, 4, 8, 8, device=device)

    def required(shape):
        assert shape == [2, 4, 8, 8]
        return 100

    assert chunks.frames_at_once(latents, 2, required) == expected


def test_the_chunk_is_chosen_once_a_run(rig, monkeypatch):
    """Other sizes round differently, and the memory that is free varies from step to step."""
    module, chunks = (rig.module(f"nodes.native.{name}") for name in ("frames", "chunks"))
    free = iter([3, 1, 7, 2])
    monkeypatch.setattr(chunks, "frames_at_once", lambda *args: next(free))
    made = []

    class Recorded(chunks.ChunkSizes):
        def __init__(self, frames=0):
            made.append(frames)
            super().__init__(frames)

    monkeypatch.setattr(module, "ChunkSizes", Recorded)
    seen = []
    model = rig.loaded.model
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[0])
    )
    try:
        rig.sample(rig.encode(rig.flow(8)), model, steps=2)
        assert seen == [6, 6, 4] * 2
        seen.clear()
        rig.sample(rig.encode(rig.flow(8)), model, steps=2)  # chosen anew in another run
    finally:
        handle.remove()
    assert seen == [2] * 16
    assert made == [0, 0]


@pytest.mark.parametrize("size, expected", [(100, 10), (6, 5), (5, 5), (4, 4), (3, 3), (1, 1)])
def test_chunks_are_about_equal(rig, size, expected):
    """Four and six frames take as long as twice five, but more memory."""
    chunks = rig.module("nodes.native.chunks")
    assert chunks.ChunkSizes(size).choose(None, torch.zeros(20, 1), 2) == expected


def test_nodes_that_keep_what_they_saw_tell_the_chunks_apart(rig):
    """Core's EasyCache knows a part of the batch again by its id."""
    import comfy.patcher_extension

    seen = []

    def look(executor, *args, **kwargs):
        seen.append(tuple(args[-1]["uuids"]))
        return executor(*args, **kwargs)

    def ids(frames, size):
        seen.clear()
        model = with_chunks(rig, size)
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(kind, "look", look)
        rig.sample(rig.encode(rig.flow(frames)), model)
        return list(seen)

    first, second, third, *next_step = ids(5, 2)
    assert len({*first, *second, *third}) == 6  # prompt and negative, in three chunks
    assert next_step == [first, second, third]
    whole, next_step = ids(5, 5)
    assert whole == next_step and len(set(whole)) == 2


def test_easycache_keeps_the_frames_apart(rig):
    """All steps after the first ones are skipped, and each frame gets its own difference."""
    core = pytest.importorskip("comfy_extras.nodes_easycache")
    if "output_channels" not in inspect.signature(core.EasyCacheHolder).parameters:
        pytest.skip("core's own EasyCache (0.3.64) fails where both prompts are one batch")
    easycache = core.EasyCacheNode
    encoded = rig.encode(rig.flow(5))

    def sample(size):
        model = with_chunks(rig, size)
        cached = easycache.execute(model, 100.0, 0.15, 0.95, False).args[0]
        return rig.sample(encoded, cached, steps=8)

    whole = sample(5)
    assert relative(whole, rig.sample(encoded, with_chunks(rig, 5), steps=8)) > 1e-3
    assert relative(sample(2), whole) < 1e-4


def test_gligen_sees_all_frames_at_once(rig, monkeypatch):
    """Its boxes are made for the whole batch before the U-Net is called."""
    import comfy.model_patcher

    seen = []

    class Boxes(torch.nn.Module):
        def set_position(self, shape, parameters, device):
            objects = torch.zeros(shape[0], 1, 1, device=device)

            def patch(x, options):
                seen.append(len(x))
                return x + objects

            return patch

    device = torch.device("cpu")
    gligen = ("position", comfy.model_patcher.ModelPatcher(Boxes(), device, device), [])
    positive, negative, latent = rig.encode(rig.flow(5))
    positive = [[text, {**rest, "gligen": gligen}] for text, rest in positive]
    model = with_chunks(rig, 2)
    asked = memory_asked_for(model, monkeypatch)
    rig.sample((positive, negative, latent), model, steps=1)
    assert set(seen) == {5}
    assert asked[:2] == [10, 5]  # core is asked for as much


@pytest.mark.parametrize("node", THINNING, ids=lambda node: node[1])
def test_equal_frames_stay_equal_beside_a_node_that_draws_in_each_call(rig, node):
    """ToMe and HyperTile draw random numbers once a call, and a chunk is a call."""
    module, name, settings = node
    encoded = rig.encode(rig.equal_flow(4, height=128, width=128))

    def sample(frames):
        torch.manual_seed(0)
        model = core_node(module, name, with_chunks(rig, frames), **settings)
        return rig.sample(encoded, model)

    chunks = sample(2)
    assert relative(chunks, rig.sample(encoded)) > 1e-4, "the node does nothing"
    assert float(chunks.std(0).max()) < 1e-5
    assert relative(chunks, sample(4)) < 1e-5


def test_random_numbers_go_on_after_the_chunks(rig):
    """A call draws the same for each chunk, and another one draws others."""
    chunks = rig.module("nodes.native.chunks")
    drawn = []

    def call(x, frames):
        drawn.append(torch.rand(()).item())
        return x

    for size in (2, 4, 2):
        chunks.in_chunks(call, chunks.ChunkSizes(size), None, 1, torch.zeros(4, 1), {})
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3] == drawn[4]


def test_a_chunk_that_is_tried_again_draws_the_same(rig):
    """What the attempt drew that ran out of memory is drawn once more."""
    from comfy.model_management import OOM_EXCEPTION

    chunks = rig.module("nodes.native.chunks")
    drawn = []

    def call(x, frames):
        drawn.append(torch.rand(()).item())
        if len(frames) > 2:
            raise OOM_EXCEPTION("out of memory")
        return x

    chunks.in_chunks(call, chunks.ChunkSizes(4), None, 1, torch.zeros(4, 1), {})
    assert len(drawn) == 3
    assert len(set(drawn)) == 1


def test_self_attention_guidance_sees_all_frames_at_once(rig):
    """Core's node keeps the attention of the U-Net's last call, and needs that of all frames."""
    encoded = rig.encode(rig.flow(5))

    def sample(frames):
        model = with_chunks(rig, frames)
        settings = {"scale": 0.5, "blur_sigma": 2.0}
        return rig.sample(
            encoded, core_node("nodes_sag", "SelfAttentionGuidance", model, **settings)
        )

    whole = sample(100)
    assert relative(whole, rig.sample(encoded)) > 1e-4, "the node does nothing"
    assert torch.equal(sample(2), whole)


def test_a_clip_that_has_to_be_whole_is_not_halved(rig):
    chunks = rig.module("nodes.native.chunks")
    seen = []

    def call(x, frames):
        seen.append(len(x))
        raise torch.cuda.OutOfMemoryError("Allocation on device")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        sizes = chunks.ChunkSizes(2, whole=True)
        chunks.in_chunks(call, sizes, None, 1, torch.zeros(6, 1), {})
    assert seen == [6]


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


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("Allocation on device"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_a_chunk_that_does_not_fit_is_halved(rig, error):
    chunks = rig.module("nodes.native.chunks")
    seen = []

    def call(x, frames, scale):
        assert len(x) == 2 * len(frames)
        seen.append(len(x))
        if len(x) > 4:
            raise error
        return x * scale

    x = torch.arange(14.0).view(14, 1)
    scale = torch.arange(14.0, 28.0).view(14, 1)
    sizes = chunks.ChunkSizes(7)
    out = chunks.in_chunks(call, sizes, None, 2, x, {"scale": scale})
    assert torch.equal(out, x * scale)
    assert seen == [14, 6, 2, 2, 2, 2, 2, 2, 2]
    chunks.in_chunks(call, sizes, None, 2, x, {"scale": scale})
    assert seen[9:] == [2] * 7  # remembered for the rest of the run


def test_control_is_whole_after_a_chunk_that_did_not_fit(rig):
    """Core empties the lists of a ControlNet while the U-Net runs."""
    from comfy.model_management import OOM_EXCEPTION

    chunks = rig.module("nodes.native.chunks")
    control = {"middle": [torch.arange(4.0).view(4, 1)], "input": [], "output": []}

    def call(x, frames, control):
        hint = control["middle"].pop()
        if len(frames) > 1:
            raise OOM_EXCEPTION("out of memory")
        return x + hint

    out = chunks.in_chunks(
        call, chunks.ChunkSizes(4), None, 1, torch.zeros(4, 1), {"control": control}
    )
    assert torch.equal(out, torch.arange(4.0).view(4, 1))


def test_an_error_that_core_takes_for_a_full_memory_is_one(rig, monkeypatch):
    """Newer versions know some by their code alone."""
    import comfy.model_management as management

    chunks = rig.module("nodes.native.chunks")
    monkeypatch.setattr(management, "is_oom", lambda error: "code 2" in str(error), raising=False)
    seen = []

    def call(x, frames):
        seen.append(len(frames))
        if len(frames) > 2:
            raise RuntimeError("accelerator error, code 2")
        return x

    chunks.in_chunks(call, chunks.ChunkSizes(4), None, 1, torch.zeros(4, 1), {})
    assert seen == [4, 2, 2]


def test_other_errors_pass(rig):
    chunks = rig.module("nodes.native.chunks")

    seen = []

    def call(x, frames):
        seen.append(len(x))
        raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes don't fit"):
        chunks.in_chunks(call, chunks.ChunkSizes(4), None, 1, torch.zeros(4, 1), {})
    assert seen == [4]  # fewer frames wouldn't help


def test_out_of_memory_with_one_frame_is_the_end(rig):
    from comfy.model_management import OOM_EXCEPTION

    chunks = rig.module("nodes.native.chunks")

    def call(x, frames):
        raise OOM_EXCEPTION("out of memory")

    with pytest.raises(OOM_EXCEPTION):
        chunks.in_chunks(call, chunks.ChunkSizes(8), None, 1, torch.zeros(3, 1), {})


def test_core_is_asked_for_the_memory_of_a_chunk(rig, monkeypatch):
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, *args):
            return None

        def get_models(self):
            return []

    model = with_chunks(rig, 2)
    asked = memory_asked_for(model, monkeypatch)
    positive, negative, latent = rig.encode(rig.flow(9))
    rig.sample((positive, negative, latent), model)
    # The first two are core's, before it loads the model: with and without guidance.
    assert asked[:2] == [4, 2]
    asked.clear()
    positive = [[text, {**rest, "control": Control()}] for text, rest in positive]
    rig.sample((positive, negative, latent), model)
    # Core runs a ControlNet on all frames, and has no other measure of what it needs.
    assert asked[:2] == [18, 9]
    asked.clear()
    guidance = core_node("nodes_sag", "SelfAttentionGuidance", model, scale=0.5, blur_sigma=2.0)
    rig.sample(rig.encode(rig.flow(9)), guidance)
    assert asked[:2] == [18, 9]


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
@pytest.mark.parametrize("anchored", [False, True])
def test_memory_does_not_grow_with_the_clip(rig, tmp_path, anchored):
    """The peak of the process: 128 frames need at most 1.15 times what 16 do.

    A U-Net of the size of the bundled one, 128x128, chunks of 16. What is in memory before (the
    interpreter, torch, the weights) plus the peak of all that sampling allocates.
    """
    import psutil

    models = rig.module("s2dm.models")
    checkpoint = rig.module("s2dm.models.checkpoint")
    found = checkpoint.load_checkpoint(rig.checkpoint)
    unet = dataclasses.replace(
        models.PUPPETS.unet, in_channels=found.config.vae.latent_channels, context_dim=64
    )
    layers = models.FlowAdapterConfig.for_unet(unet)
    config = dataclasses.replace(found.config, unet=unet, flow_adapter=layers)
    keys = rig.module("s2dm.models.keys").unet_keys(unet)
    generator = torch.Generator().manual_seed(0)
    states = {
        **found.states,
        "unet": {key.ldm: 0.05 * torch.randn(key.ldm_shape, generator=generator) for key in keys},
        "flow_adapter": models.FlowAdapter(layers).state_dict(),
    }
    path = tmp_path / "larger.safetensors"
    checkpoint.save_checkpoint(path, checkpoint.Checkpoint(config, states))
    model = rig.module("nodes.native.loading").load_all(str(path), chunk_size=16).model

    def peak(frames):
        flow = rig.flow(frames, height=128, width=128)
        encoded, sampled = rig.encode(flow), model
        if anchored:
            picture = {"vae": rig.loaded.vae, "reference": torch.rand(1, 128, 128, 3)}
            (sampled,) = rig.run(
                "S2DMAnchorToReference",
                model=model,
                flow=flow,
                reference_attention="on",
                **picture,
            )
        with Allocated() as allocated:
            rig.sample(encoded, sampled, steps=1)
        return allocated.peak

    peak(1)
    before = psutil.Process().memory_info().rss
    short, long = peak(16), peak(128)
    assert short > 5e7, "most was not counted"
    assert before + long <= 1.15 * (before + short)
    # A frame more is its latents, its label and its prompt, not its way through the U-Net.
    assert (long - short) / 112 < short / 16 / 10
