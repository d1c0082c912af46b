"""Two engines, one result: ComfyUI's samplers and the diffusers pipeline on the same file."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import relative
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.flow import FlowField
from s2dm.models import FUSIONS, Checkpoint, SamplingConfig, load_checkpoint, save_checkpoint
from s2dm.pipelines import FlowToVideoPipeline
from s2dm.sector import NoiseSharing

pytestmark = pytest.mark.comfyui

PROMPT = "a man in a red shirt is walking"
TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def text_in_float32(comfy):
    """On a CPU, core rounds the weights of text encoders to float16 unless told not to."""
    from comfy.cli_args import args

    before, args.fp32_text_enc = args.fp32_text_enc, True
    yield
    args.fp32_text_enc = before


@pytest.fixture(scope="module")
def exact(rig, text_in_float32):
    return type(rig)(rig.pack, rig.nodes, rig.checkpoint)


@pytest.fixture(scope="module")
def exact_of(rig_of, text_in_float32):
    """The same with a fusion."""

    def of(fusion):
        rig = rig_of(fusion)
        return type(rig)(rig.pack, rig.nodes, rig.checkpoint)

    return of


def both(rig, flow, prompt=PROMPT, negative="", steps=20, cfg=7.5, seed=3, **options):
    """Latents of ComfyUI and of the pipeline, both scaled as the U-Net sees them."""
    sharing = options.pop("noise_sharing", "shared")
    guide_flow = options.pop("guide_flow", True)
    flow_start = options.pop("flow_start", 0.0)
    height, width = options.pop("size", (0, 0))
    reference = options.pop("reference", None)
    anchor_end = options.pop("anchor_end", 0.0)
    sees = options.pop("reference_attention", False)
    key_frame = options.pop("key_frame", False)
    encoded = rig.encode(
        flow,
        prompt,
        negative=rig.prompt(negative),
        guide_flow="on" if guide_flow else "off",
        start_percent=flow_start,
        height=height,
        width=width,
    )
    model = rig.loaded.model
    if anchor_end:
        (model,) = rig.run(
            "S2DMAnchorToReference",
            model=model,
            vae=rig.loaded.vae,
            reference=reference,
            flow=flow,
            end_percent=anchor_end,
            reference_attention="on" if sees else "off",
            key_frame="on" if key_frame else "off",
        )
    comfy = rig.sample(encoded, model, seed=seed, steps=steps, cfg=cfg, noise_sharing=sharing)
    pipeline = FlowToVideoPipeline.from_single_file(rig.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    diffusers = pipeline(
        prompt,
        # The pack's modules have other names here than the library's: the same class twice.
        FlowField(flow.displacement, flow.occlusion),
        negative_prompt=negative,
        height=height or None,
        width=width or None,
        sampling=SamplingConfig(
            steps,
            cfg,
            cfg if guide_flow else 1.0,
            flow_start,
            anchor_end=anchor_end,
            reference_attention=sees,
            key_frame=key_frame,
        ),
        reference=None if reference is None else reference[0].movedim(-1, 0),
        seed=seed,
        noise_sharing=NoiseSharing(sharing),
        output_type="latent",
    ).frames
    return comfy * pipeline.vae.config.scaling_factor, diffusers


def test_the_engines_agree(exact):
    comfy, diffusers = both(exact, exact.flow(3))
    assert comfy.shape == diffusers.shape
    assert relative(comfy, diffusers) <= TOLERANCE
    # Not because nothing depends on the conditions.
    other, _ = both(exact, exact.flow(3, seed=1))
    assert relative(other, diffusers) > 10 * TOLERANCE


@pytest.mark.parametrize("start", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("guide_flow", [True, False])
def test_a_later_start_of_the_flow_agrees(exact, start, guide_flow):
    options = dict(steps=10, guide_flow="on" if guide_flow else "off")
    comfy, diffusers = both(exact, exact.flow(3), flow_start=start, **options)
    assert relative(comfy, diffusers) <= TOLERANCE
    assert relative(both(exact, exact.flow(3), **options)[1], diffusers) > 10 * TOLERANCE


@pytest.mark.parametrize("end, sees", [(0.95, False), (0.95, True), (0.5, False)])
def test_an_anchor_agrees(exact, end, sees):
    options = {"reference": torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))}
    options |= {"anchor_end": end, "reference_attention": sees, "steps": 10}
    comfy, diffusers = both(exact, exact.flow(3), **options)
    assert relative(comfy, diffusers) <= TOLERANCE
    assert relative(comfy, both(exact, exact.flow(3), steps=10)[0]) > 10 * TOLERANCE


@pytest.mark.parametrize("height, width", [(60, 44), (96, 120)])
def test_an_anchor_agrees_on_sizes(exact, height, width):
    picture = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    flow = exact.flow(2, height, width)
    options = {"reference": picture, "anchor_end": 0.95, "steps": 5}
    assert relative(*both(exact, flow, **options)) <= TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        {"flow_start": 0.2, "reference_attention": True},
        {"noise_sharing": "mixed", "guide_flow": False},
        {"size": (64, 64)},
    ],
    ids=lambda case: "-".join(case),
)
def test_a_key_frame_agrees(exact, case):
    """Frame 3 of a flow that may be of another size than the clip."""
    side = 96 if "size" in case else 64
    flow = exact.flow(4, side, side)
    flow.displacement[2] = flow.displacement[2] * 2
    options = {"anchor_end": 1.0, "steps": 5, "cfg": 4.0, **case}
    comfy, diffusers = both(exact, flow, key_frame=True, **options)
    assert relative(comfy, diffusers) <= TOLERANCE
    without = both(exact, flow, **options)
    assert relative(*without) <= TOLERANCE
    assert relative(comfy, without[0]) > 10 * TOLERANCE


def test_v_prediction_agrees(exact, tmp_path):
    """What the bundled model predicts."""
    found = load_checkpoint(exact.checkpoint)
    schedule = dataclasses.replace(found.config.schedule, prediction_type="v_prediction")
    config = dataclasses.replace(found.config, schedule=schedule)
    path = tmp_path / "v.safetensors"
    save_checkpoint(path, Checkpoint(config, found.states))
    predicts_v = type(exact)(exact.pack, exact.nodes, path)
    comfy, diffusers = both(predicts_v, exact.flow(3))
    assert relative(comfy, diffusers) <= TOLERANCE
    predicts_noise, _ = both(exact, exact.flow(3))
    assert relative(comfy, predicts_noise) > 0.1


def test_latents_of_more_channels_agree(exact, tmp_path):
    """Of a sharper autoencoder than Stable Diffusion's: sampled, previewed and decoded."""
    config = tiny_config(flow_generator=None)
    config = dataclasses.replace(
        config,
        unet=dataclasses.replace(config.unet, in_channels=16),
        vae=dataclasses.replace(config.vae, latent_channels=16),
    )
    path = write_random_checkpoint(tmp_path / "wide.safetensors", config)
    wide = type(exact)(exact.pack, exact.nodes, path)
    flow = wide.flow(3)
    comfy, diffusers = both(wide, flow)
    assert comfy.shape == (3, 16, 8, 8)
    assert relative(comfy, diffusers) <= TOLERANCE
    latent_format = wide.loaded.model.get_model_object("latent_format")
    assert len(latent_format.latent_rgb_factors) == 16
    with torch.inference_mode():
        assert wide.loaded.vae.decode(comfy).shape == (3, 64, 64, 3)


@pytest.mark.parametrize("fusion", FUSIONS[1:])
def test_other_fusions_agree(exact_of, fusion):
    rig = exact_of(fusion)
    assert relative(*both(rig, rig.flow(3), steps=10)) <= TOLERANCE


@pytest.mark.parametrize("height, width", [(72, 40), (60, 136)])
def test_spatial_fusion_agrees_at_sizes_that_halve_unevenly(exact_of, height, width):
    """9x5 and 8x17 latents: the coarser level has 5x3 and 4x9."""
    rig = exact_of("channel+spatial")
    comfy, diffusers = both(rig, rig.flow(2, height, width), steps=5)
    assert comfy.shape[-2:] == (-(-height // 8), -(-width // 8))
    assert relative(comfy, diffusers) <= TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        {"prompt": " ".join([PROMPT] * 15)},  # over 77 tokens beside a short negative
        {"negative": "a woman in a blue dress", "cfg": 4.0},
        {"cfg": 1.0},
        {"guide_flow": False},
        {"noise_sharing": "independent"},
        {"noise_sharing": "mixed"},
        {"steps": 10},
        {"seed": 2**40 + 1},
    ],
    ids=lambda case: "-".join(case),
)
def test_the_engines_agree_on_every_setting(exact, case):
    assert relative(*both(exact, exact.flow(2), **{"steps": 5, **case})) <= TOLERANCE


@pytest.mark.parametrize("frames, height, width", [(1, 64, 64), (17, 32, 32), (2, 96, 120)])
def test_the_engines_agree_on_sizes(exact, frames, height, width):
    assert relative(*both(exact, exact.flow(frames, height, width), steps=3)) <= TOLERANCE


@pytest.mark.parametrize("size", [48, 96, 160])
def test_the_engines_agree_on_flow_of_another_size(exact, size):
    """Of a flow with sharp borders: what resizes it once more gives other latents."""
    flow = exact.equal_flow(3, height=size, width=size)
    flow.displacement[1:, :, size // 4 : size // 2, size // 3 :] = size / 16
    comfy, diffusers = both(exact, flow, steps=3, size=(64, 64))
    assert comfy.shape[-2:] == (8, 8)
    assert relative(comfy, diffusers) <= TOLERANCE
    still = both(exact, exact.equal_flow(3), steps=3)[0]
    assert relative(comfy, still) > 10 * TOLERANCE


@pytest.mark.slow
def test_the_engines_agree_on_the_bundled_checkpoint(rig):
    bundled = type(rig)(rig.pack, rig.nodes, DEFAULT_CHECKPOINT)
    prompt = "A man with glasses, wearing a black coat and blue jeans is squat"
    comfy, diffusers = both(bundled, bundled.flow(2, 128, 128), prompt)
    assert relative(comfy, diffusers) <= TOLERANCE


@pytest.mark.slow
def test_the_engines_agree_on_what_the_bundled_checkpoint_recommends(rig):
    """Widgets as they are, and nothing said to the pipeline: anchored, from a key frame."""
    bundled = type(rig)(rig.pack, rig.nodes, DEFAULT_CHECKPOINT)
    prompt = "A man with glasses, wearing a black coat and blue jeans is squat"
    flow, loaded = bundled.flow(2, 128, 128), bundled.loaded
    (model,) = bundled.run("S2DMAnchorToReference", model=loaded.model, vae=loaded.vae, flow=flow)
    encoded = bundled.encode(flow, prompt)
    comfy = bundled.sample(encoded, model, seed=3, steps=0, cfg=0.0)
    pipeline = FlowToVideoPipeline.from_single_file(bundled.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    given = FlowField(flow.displacement, flow.occlusion)
    diffusers = pipeline(prompt, given, seed=3, output_type="latent").frames
    assert relative(comfy * pipeline.vae.config.scaling_factor, diffusers) <= TOLERANCE
