"""Self-attention that also sees frame 1, in core's U-Nets."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from core_nodes import THINNING, core_node, windowed

pytestmark = pytest.mark.comfyui

FRAMES = 5


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoded(rig):
    return rig.encode(rig.flow(FRAMES))


def seeing(rig, picture, model=None, chunk_size=100, attention="on", frames=FRAMES, **inputs):
    if model is None:
        apply_adapter = rig.module("nodes.native.adapter").apply_adapter
        model = apply_adapter(rig.plain_model(), *rig.adapter(), chunk_size=chunk_size)
    return rig.run(
        "S2DMAnchorToReference",
        model=model,
        vae=rig.loaded.vae,
        reference=picture,
        flow=rig.flow(frames),
        reference_attention=attention,
        # Next to no anchor, so that what attention does is seen.
        **{"strength": 0.01, **inputs},
    )[0]


def test_frame_1_sees_itself_twice(rig, picture, encoded):
    """So it stays as it was, and the others don't."""
    plain = rig.sample(encoded, seeing(rig, picture, attention="off"))
    clip = rig.sample(encoded, seeing(rig, picture))
    assert relative(clip[:1], plain[:1]) < 1e-5
    assert relative(clip[1:], plain[1:]) > 1e-4


def test_no_frame_sees_another_than_frame_1(rig, picture, encoded):
    """The clip of the first three frames is the first three frames of the clip."""
    flow = rig.flow(FRAMES)
    part = type(flow)(flow.displacement[:3], flow.occlusion[:3])
    clip = rig.sample(encoded, seeing(rig, picture))
    model = rig.run(
        "S2DMAnchorToReference",
        model=rig.loaded.model,
        vae=rig.loaded.vae,
        reference=picture,
        flow=part,
        strength=0.01,
        reference_attention="on",
    )[0]
    assert relative(rig.sample(rig.encode(part), model), clip[:3]) < 1e-5


@pytest.mark.parametrize("size, cfg", [(1, 4.0), (2, 1.0), (3, 4.0)])
def test_chunks_are_exact(rig, picture, encoded, size, cfg):
    whole = rig.sample(encoded, seeing(rig, picture), cfg=cfg)
    clip = rig.sample(encoded, seeing(rig, picture, chunk_size=size), cfg=cfg)
    assert relative(clip, whole) < 1e-5


def test_a_chunk_that_is_halved(rig, picture, encoded, monkeypatch):
    whole = rig.sample(encoded, seeing(rig, picture))
    model = seeing(rig, picture)
    unet = model.model.diffusion_model
    failed = []

    def fail_once(module, arguments):
        if len(arguments[0]) == 2 * FRAMES and not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError("Allocation on device")

    handle = unet.register_forward_pre_hook(fail_once)
    try:
        assert relative(rig.sample(encoded, model), whole) < 1e-5
    finally:
        handle.remove()
    assert failed


def test_conditions_in_calls_of_their_own(rig, picture, encoded, monkeypatch):
    """Where memory is short, core calls with the prompt and with the negative one by one."""
    whole = rig.sample(encoded, seeing(rig, picture))
    model = seeing(rig, picture, chunk_size=2)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 2**60)
    seen = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, arguments: seen.append(len(arguments[0]))
    )
    try:
        assert relative(rig.sample(encoded, model), whole) < 1e-5
    finally:
        handle.remove()
    # In the first of two steps the frames of the negative prompt are equal.
    assert seen == [1, 2, 2, 1] + [2, 2, 1] * 2


def test_the_states_of_frame_1_alone_are_kept(rig, picture, encoded, monkeypatch):
    native = rig.module("nodes.native.anchor")
    made = []

    class Watched(native.ReferenceStates):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(native, "ReferenceStates", Watched)
    rig.sample(encoded, seeing(rig, picture, chunk_size=3), steps=3)
    assert len(made) == 3  # anew for each step
    for states in made[1:]:
        assert states._kept
        for kept in states._kept.values():
            assert kept.shape[:2] == (1, 1)
            assert kept.untyped_storage().nbytes() == kept.nbytes


@pytest.mark.parametrize(
    "node",
    [
        *THINNING,
        ("nodes_pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
        ("nodes_sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    ],
    ids=lambda node: node[1],
)
@pytest.mark.parametrize("before", [True, False])
def test_other_nodes_of_self_attention(rig, picture, encoded, node, before):
    """They work in either order, and give in chunks what they give at once."""
    module, name, settings = node

    def sample(size, attention="on"):
        apply_adapter = rig.module("nodes.native.adapter").apply_adapter
        model = apply_adapter(rig.plain_model(), *rig.adapter(), chunk_size=size)
        if before:
            model = core_node(module, name, model, **settings)
        model = seeing(rig, picture, model, attention=attention)
        if not before:
            model = core_node(module, name, model, **settings)
        return rig.sample(encoded, model)

    whole = sample(100)
    assert whole.isfinite().all()
    assert relative(sample(2), whole) < 1e-5
    assert relative(whole, sample(100, "off")) > 1e-5
    assert relative(whole, rig.sample(encoded, seeing(rig, picture))) > 1e-4, f"{name} does nothing"


def test_a_patch_of_cross_attention(rig, picture, encoded):
    """As IPAdapter's: it gets its own layers, not ours."""

    def sample(size):
        model = seeing(rig, picture, chunk_size=size)
        model.set_model_attn2_patch(lambda n, context, value, extra: (n, context, 0.5 * value))
        return rig.sample(encoded, model)

    assert relative(sample(2), sample(100)) < 1e-5
    assert relative(sample(2), rig.sample(encoded, seeing(rig, picture))) > 1e-5


@pytest.fixture
def windows_work(comfy_version):
    if comfy_version < (0, 33):
        pytest.skip("core's windows don't cut conditions in this version")


def test_context_windows_see_frame_1_of_the_clip(rig, picture, windows_work):
    encoded = rig.encode(rig.flow(7))
    usual = rig.sample(encoded, seeing(rig, picture, frames=7))
    model = windowed(seeing(rig, picture, chunk_size=3, frames=7))
    assert relative(rig.sample(encoded, model), usual) < 1e-5


def test_windows_that_begin_elsewhere_are_refused(rig, picture, windows_work, monkeypatch):
    from comfy import context_windows

    encoded = rig.encode(rig.flow(7))
    model = windowed(seeing(rig, picture, frames=7), causal_window_fix=False)
    handler = model.model_options["context_handler"]
    schedule = context_windows.ContextSchedule(
        "backwards", lambda *args: [[3, 4, 5, 6], [0, 1, 2, 3]]
    )
    monkeypatch.setattr(handler, "context_schedule", schedule)
    expected = r"Anchor to Reference \(S2DM\): expected the first context window .* with frame 1"
    with pytest.raises(ValueError, match=expected):
        rig.sample(encoded, model)


def test_a_model_without_such_attention_says_so(rig, picture, monkeypatch, caplog):
    native = rig.module("nodes.native.anchor")
    monkeypatch.setattr(native.openaimodel, "UNetModel", type("Other", (), {}))
    model = seeing(rig, picture)
    assert "no self-attention of Stable Diffusion's kind" in caplog.text
    assert not model.get_wrappers("apply_model", native.KEY)
    caplog.clear()
    seeing(rig, picture, attention="auto")
    assert not caplog.text
