"""Flow at the resolution of the latents: what its many tokens must not break."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from core_nodes import THINNING, core_node, windowed

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", params=["spatial", "channel+spatial"])
def spatial(request, rig_of):
    return rig_of(request.param)


def with_area(conditioning, *area):
    return [[text, {**rest, "area": area}] for text, rest in conditioning]


def patched(rig, **settings):
    adapter = rig.module("nodes.native.adapter")
    return adapter.apply_adapter(rig.plain_model(), *rig.adapter(), **settings)


def test_chunks_are_the_whole_clip(spatial):
    encoded = spatial.encode(spatial.flow(5, height=72, width=40))
    whole = spatial.sample(encoded, patched(spatial, chunk_size=100))
    assert relative(spatial.sample(encoded, patched(spatial, chunk_size=2)), whole) < 1e-5


def test_strength_goes_from_the_plain_model_to_the_adapter(spatial):
    encoded = spatial.encode(spatial.flow(3))
    off, half, on = (
        spatial.sample(encoded, patched(spatial, strength=strength, chunk_size=100), steps=1)
        for strength in (0.0, 0.5, 1.0)
    )
    assert torch.equal(off, spatial.sample(encoded, spatial.plain_model(), steps=1))
    assert relative(off, on) > relative(half, on) > 1e-4


def test_strength_of_the_flow_start_and_end(spatial):
    flow = spatial.flow(3)

    def made(**settings):
        return spatial.sample(spatial.encode(flow, **settings), steps=4)

    full, null, early = made(start_percent=0.0), made(strength=0.0), made(end_percent=0.5)
    assert relative(made(start_percent=0.0, end_percent=0.0), null) < 1e-6
    assert relative(early, full) > 1e-4 and relative(early, null) > 1e-4
    assert relative(made(strength=0.5), full) > 1e-4


def test_flow_acts_where_it_moves(rig_of):
    """From one layer near the output, in one step: norms carry a little to other places."""
    rig = rig_of("spatial")
    config, state = rig.adapter()
    name = config.layers[-1][0]
    state = {
        key: weight if f"layers.{name}" in key or "layers" not in key else torch.zeros_like(weight)
        for key, weight in state.items()
    }
    model = rig.module("nodes.native.adapter").apply_adapter(rig.plain_model(), config, state)
    still = rig.equal_flow(2, height=64, width=128)
    moved = still.displacement.clone()
    moved[1, :, :, 96:] = 9.0
    moving = type(still)(moved, still.occlusion)
    one, other = (rig.sample(rig.encode(flow), model, steps=1, cfg=1.0) for flow in (still, moving))
    change = (one - other)[1].abs().mean((0, 1))
    assert change[13:].mean() > 2 * change[:8].mean()


def test_mask(spatial):
    """A mask of ones is no mask, a mask of zeros the null label, and half a mask is between."""
    flow = spatial.flow(3)
    full = spatial.sample(spatial.encode(flow))
    null = spatial.sample(spatial.encode(flow, strength=0.0))
    half = torch.ones(1, 64, 64)
    half[:, :, 32:] = 0
    assert relative(spatial.sample(spatial.encode(flow, mask=torch.ones(1, 64, 64))), full) < 1e-5
    assert relative(spatial.sample(spatial.encode(flow, mask=0 * half)), null) < 1e-5
    masked = spatial.sample(spatial.encode(flow, mask=half))
    assert relative(masked, full) > 1e-4 and relative(masked, null) > 1e-4


def test_areas_of_different_sizes_in_one_prompt(spatial):
    """Each area sees its own part of the flow, at its own size; the rest, the whole."""
    flow = spatial.flow(3, height=64, width=128)
    positive, negative, latent = spatial.encode(flow)
    right = type(flow)(
        flow.displacement[..., 72:].contiguous(), flow.occlusion[..., 72:].contiguous()
    )
    # 7 latents wide, one of which core cuts off: it lies beyond the border.
    areas = with_area(positive, 8, 9, 0, 0) + with_area(positive, 8, 8, 0, 9)
    whole = spatial.sample((areas, negative, latent), steps=1, cfg=1.0)
    noise = spatial.module("nodes.native.noise").SharedNoise(7).generate_noise(latent)
    alone = spatial.sample_noise(spatial.encode(right), noise[..., 9:], steps=1, cfg=1.0)
    assert relative(whole[..., 9:], alone) < 1e-5
    both = spatial.sample((areas + positive, negative, latent))
    assert torch.isfinite(both).all()


def test_what_changes_the_size_inside_the_unet_is_refused(rig_of):
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    rig = rig_of("spatial")
    arguments = (rig.loaded.model, 1, 1.5, 0.0, 1.0, True, "bicubic", "bicubic")
    if hasattr(PatchModelAddDownscale, "execute"):
        model = PatchModelAddDownscale.execute(*arguments).args[0]
    else:
        (model,) = PatchModelAddDownscale().patch(*arguments)
    with pytest.raises(ValueError, match=r"a layer of 8x8, 4x4 pixels.*got one of .*Deep Shrink"):
        rig.sample(rig.encode(rig.flow(2)), model)


def test_tiles_are_refused_by_name(rig_of):
    rig = rig_of("spatial")
    model = rig.loaded.model.clone()

    def tile(call, given):
        rows = given["input"][..., :4, :]
        return call(rows, given["timestep"], **given["c"]).repeat(1, 1, 2, 1)

    model.set_model_unet_function_wrapper(tile)
    with pytest.raises(ValueError, match=r"sizes \[\(8, 8\)\].*got \(4, 8\).*tiles"):
        rig.sample(rig.encode(rig.flow(2)), model)


@pytest.mark.parametrize("anchors", [False, True], ids=["plain", "anchored"])
def test_context_windows_change_nothing(spatial, comfy_version, anchors):
    """Anchored from a key frame: what is drawn before the clip is shorter than a window."""
    if comfy_version < (0, 33):
        pytest.skip("refused, whatever the fusion")
    flow = spatial.flow(7)
    model, encoded = spatial.loaded.model, spatial.encode(flow)
    if anchors:
        settings = {"end_percent": 1.0, "reference_attention": "off", "key_frame": "on"}
        told = {"model": model, "vae": spatial.loaded.vae, "flow": flow}
        (model,) = spatial.run("S2DMAnchorToReference", **told, **settings)
    usual = spatial.sample(encoded, model)
    assert relative(spatial.sample(encoded, windowed(model)), usual) < 1e-5
    still = spatial.encode(spatial.equal_flow(7))
    assert anchors or relative(spatial.sample(still, model), usual) > 1e-4


@pytest.mark.parametrize("node", THINNING, ids=lambda node: node[1])
def test_nodes_that_thin_out_self_attention_leave_the_flow_its_pixels(spatial, node):
    """They change how many pixels self-attention sees, not cross-attention."""
    module, name, settings = node
    model = core_node(module, name, spatial.loaded.model, **settings)
    size = {"height": 128, "width": 128}
    moving, still = (
        spatial.encode(spatial.flow(2, **size)),
        spatial.encode(spatial.equal_flow(2, **size)),
    )
    clips = []
    for encoded, chosen in ((moving, model), (still, model), (moving, spatial.loaded.model)):
        torch.manual_seed(0)
        clips.append(spatial.sample(encoded, chosen))
    assert relative(clips[0], clips[1]) > 1e-4, "the flow is lost"
    assert relative(clips[0], clips[2]) > 1e-4, "the node does nothing"


def test_saved_by_core_and_loaded_again(rig_of, tmp_path):
    """Save Checkpoint keeps the adapter, and its strength, whatever its fusion."""
    import comfy.sd

    rig = rig_of("channel+spatial")
    saving = rig.module("nodes.native.saving")
    config = rig.loaded.config
    model = patched(rig, strength=0.5)
    saving.keep_when_saving(model, config, 0.5)
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(
        str(path), model, rig.loaded.clip, rig.loaded.vae, metadata={}, extra_keys={}
    )
    again = type(rig)(rig.pack, rig.nodes, path)
    encoded = rig.encode(rig.flow(3))
    assert relative(rig.sample(encoded, again.loaded.model), rig.sample(encoded, model)) < 1e-3
