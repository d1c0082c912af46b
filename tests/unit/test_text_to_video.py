"""The two-stage pipeline: its contracts on a tiny model with random weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from compare import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_checkpoint import TINY, tiny_config, write_random_checkpoint
from tiny_text_to_video import PROMPT, SHORT, STAGE_2, load, short

from s2dm.flow import FlowField
from s2dm.models import (
    FLOW_SAMPLERS,
    MAX_FRAMES,
    FlowSampling,
    SamplingConfig,
)
from s2dm.pipelines import (
    FlowToVideoPipeline,
    TextToVideoPipeline,
    embed_prompts,
)
from s2dm.sector import NoiseSharing

TRAINED = TINY.flow_generator


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> TextToVideoPipeline:
    torch.set_num_threads(1)
    return load(checkpoint)


@pytest.fixture
def seen(pipeline):
    """What the flow generator is given, call by call."""
    calls = []
    hook = pipeline.flow_generator.network.register_forward_pre_hook(
        lambda _, inputs: calls.append(inputs)
    )
    yield calls
    hook.remove()


def picture(height: int = 64, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


# The three steps of the paper


@pytest.mark.parametrize("frames", [1, 2, 4, 9])
def test_frame_1_is_the_reference_frame(pipeline, frames):
    made = pipeline(PROMPT, frames, **SHORT)
    assert made.frames.shape == (frames, 4, 8, 6)
    assert 0.1 < made.reference.std() < 10
    assert (made.frames[0] - made.reference).abs().max() < 1e-4
    if frames > 1:  # the others move, or this would hold of any frame
        assert relative(made.frames[-1], made.reference) > 0.01


@pytest.mark.parametrize("sharing", ["shared", "independent"])
def test_frame_1_is_the_reference_frame_with_guidance_and_few_at_a_time(pipeline, sharing):
    options = short(guidance_scale=7.5, flow_guidance_scale=2.0)
    made = pipeline(PROMPT, 5, noise_sharing=NoiseSharing(sharing), chunk_size=2, **options)
    assert relative(made.frames[0], made.reference) < 1e-4


def test_the_reference_frame_is_the_prompt_with_zero_flow(checkpoint, pipeline):
    stage_2 = FlowToVideoPipeline.from_single_file(checkpoint)
    still = stage_2(PROMPT, FlowField.zeros(1, 64, 48), **STAGE_2).frames
    made = pipeline(PROMPT, 3, **SHORT)
    assert torch.equal(made.reference, still[0])
    again = stage_2(PROMPT, made.flow, **STAGE_2).frames
    assert torch.equal(made.frames, again)


def test_stage_1_reads_prompt_and_reference_frame(pipeline, seen):
    made = pipeline(PROMPT, **SHORT)
    sample, _, reference, text, motion = seen[0]
    assert len(seen) == 3
    assert sample.shape == (1, TRAINED.frames, 3, *TRAINED.size)
    assert torch.equal(reference[0], made.reference)
    assert torch.equal(text, embed_prompts(pipeline.text_encoder, pipeline.tokenizer, [PROMPT]))
    assert motion is None


def test_the_noise_of_stage_1_is_not_that_of_stage_2(pipeline, seen):
    nus = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: nus.append(inputs[0]))
    pipeline(PROMPT, 2, **SHORT)
    hook.remove()
    nu, noise = nus[0].flatten(), seen[0][0].flatten()[: nus[0].numel()]
    assert torch.corrcoef(torch.stack([nu, noise]))[0, 1].abs() < 0.5


# Any number of frames


def test_the_flow_is_retimed_to_the_frames_asked_for(pipeline):
    trained = pipeline(PROMPT, **SHORT)
    assert len(trained.flow) == len(trained.frames) == TRAINED.frames
    for frames in (2, 3, 7, MAX_FRAMES):
        made = pipeline(PROMPT, frames, chunk_size=64, **short(steps=1))
        flow, expected = made.flow, pipeline(PROMPT, **short(steps=1)).flow
        assert len(made.frames) == frames
        assert torch.equal(flow.displacement, expected.retime(frames).displacement)
        assert torch.equal(flow.occlusion, expected.retime(frames).occlusion)


@settings(max_examples=8, deadline=None)
@given(
    frames=st.integers(2, MAX_FRAMES),
    height=st.integers(17, 40),  # at 16, the smallest of networks would normalise single numbers
    width=st.integers(17, 40),
    chunk=st.integers(1, 64),
)
def test_any_number_of_frames_and_any_size(pipeline, frames, height, width, chunk):
    options = short(steps=1) | {"flow_sampling": FlowSampling(1), "output_type": "pt"}
    made = pipeline(PROMPT, frames, height=height, width=width, chunk_size=chunk, **options)
    assert made.frames.shape == (frames, 3, height, width)
    assert made.reference.shape == (3, height, width)
    assert made.flow.displacement.shape == (frames, 2, height, width)
    assert (made.frames[0] - made.reference).abs().max() < 1e-4
    assert torch.isfinite(made.frames).all()


def test_a_flow_is_cropped_like_its_frames(pipeline):
    """Sizes are generated in whole latent cells: 60x44 is the corner of 64x48."""
    whole = pipeline(PROMPT, height=64, width=48, **SHORT).flow
    part = pipeline(PROMPT, height=60, width=44, **SHORT).flow
    assert torch.equal(part.displacement, whole.displacement[..., :60, :44])


# Settings


def test_a_seed_fixes_the_clip_and_another_changes_it(pipeline):
    first, second = pipeline(PROMPT, 3, **SHORT), pipeline(PROMPT, 3, **SHORT)
    assert torch.equal(first.frames, second.frames)
    assert torch.equal(first.flow.displacement, second.flow.displacement)
    for seed in (2, None):
        other = pipeline(PROMPT, 3, **SHORT | {"seed": seed})
        assert relative(other.reference, first.reference) > 0.1
        assert relative(other.flow.displacement, first.flow.displacement) > 0.01


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
def test_chunks_change_nothing(pipeline, chunk_size):
    whole = pipeline(PROMPT, 7, chunk_size=7, **SHORT)
    made = pipeline(PROMPT, 7, chunk_size=chunk_size, **SHORT)
    assert relative(made.frames, whole.frames) < 1e-5
    assert torch.equal(made.reference, whole.reference)
    assert torch.equal(made.flow.displacement, whole.flow.displacement)
    assert torch.equal(made.flow.occlusion, whole.flow.occlusion)


def test_motion_strength_reaches_the_network(pipeline, seen):
    left_open = pipeline(PROMPT, **SHORT).flow
    flows = [
        pipeline(PROMPT, **SHORT | {"flow_sampling": FlowSampling(3, motion_strength=s)}).flow
        for s in (0.0, 1.0, 2.5)
    ]
    given = [None if motion is None else motion.item() for *_, motion in seen[::3]]
    assert given[0] is None
    assert given[1:] == pytest.approx([0.0, TRAINED.motion, 2.5 * TRAINED.motion])
    for number, flow in enumerate(flows):
        for other in (left_open, *flows[:number]):
            assert relative(flow.displacement, other.displacement) > 1e-4


def test_every_setting_of_stage_1_matters(pipeline):
    base = pipeline(PROMPT, **SHORT).flow.displacement
    changed = {
        "prompt": pipeline("a man in a red shirt is walking", **SHORT),
        "reference": pipeline(PROMPT, reference=picture(), **SHORT),
    }
    for name, sampling in {
        "steps": FlowSampling(4),
        "guidance": FlowSampling(3, guidance_scale=3.0),
        "sampler": FlowSampling(3, sampler=FLOW_SAMPLERS[1]),
    }.items():
        changed[name] = pipeline(PROMPT, **SHORT | {"flow_sampling": sampling})
    for name, made in changed.items():
        assert relative(made.flow.displacement, base) > 1e-4, name


def test_settings_of_stage_2_reach_the_clip(pipeline):
    guided = short(guidance_scale=3.0)
    base = pipeline(PROMPT, 3, **guided)
    for change in (
        {"negative_prompt": "red coat"},
        {"sampling": guided["sampling"] | {"guidance_scale": 2.0}},
        {"sampling": guided["sampling"] | {"flow_guidance_scale": 1.5}},
        {"sampling": guided["sampling"] | {"flow_start": 1.0}},
        {"noise_sharing": NoiseSharing("independent")},
        {"noise_sharing": NoiseSharing("mixed", 0.2)},
    ):
        made = pipeline(PROMPT, 3, **guided | change)
        assert relative(made.frames, base.frames) > 1e-4, change


def test_what_is_not_given_is_as_the_checkpoint_recommends(pipeline, tmp_path):
    config = tiny_config(sampling=SamplingConfig(2, 3.0, 1.5, 0.5))
    source = load(write_random_checkpoint(tmp_path / "recommends.safetensors", config))
    common = dict(flow_sampling=FlowSampling(1), seed=1, output_type="latent")
    told = {"steps": 2, "guidance_scale": 3.0, "flow_guidance_scale": 1.5, "flow_start": 0.5}
    made, expected = source(PROMPT, 2, **common), pipeline(PROMPT, 2, sampling=told, **common)
    assert relative(made.frames, expected.frames) < 1e-6
    assert relative(made.reference, expected.reference) < 1e-6
    # The paper's guidance, in both of the calls to stage 2.
    scales = {"guidance_scale": 4.0, "flow_guidance_scale": 4.0}
    both = source(PROMPT, 2, sampling=scales, **common)
    told = {"steps": 2, "guidance_scale": 4.0, "flow_start": 0.5}
    joint = pipeline(PROMPT, 2, sampling=told, **common)
    assert relative(both.frames, joint.frames) < 1e-6


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_without_a_prompt_stage_1_has_its_null_label(pipeline, seen, blank):
    made = pipeline(blank, 2, **SHORT | {"flow_sampling": FlowSampling(3, guidance_scale=3.0)})
    assert [text for *_, text, _ in seen] == [None] * 3
    assert torch.isfinite(made.frames).all()


def test_an_empty_prompt_gives_a_clip(pipeline):
    made = pipeline("", 2, **SHORT)
    assert torch.isfinite(made.frames).all()
    assert relative(made.frames, pipeline(PROMPT, 2, **SHORT).frames) > 1e-4
    assert torch.isfinite(pipeline(" ".join([PROMPT] * 12), 2, **SHORT).frames).all()


def test_frames_come_in_the_form_asked_for(pipeline):
    options = SHORT | {"output_type": "pt"}
    made = pipeline(PROMPT, 2, **options)
    assert made.frames.shape == (2, 3, 64, 48)
    assert made.frames.dtype == torch.float32
    assert 0 <= made.frames.min() and made.frames.max() <= 1
    assert (made.frames[0] - made.reference).abs().max() < 1e-4
    pictures = pipeline(PROMPT, 2, **options | {"output_type": "pil"})
    assert [p.size for p in (*pictures.frames, pictures.reference)] == [(48, 64)] * 3


def test_steps_are_counted_through_the_stages_and_can_stop_the_run(pipeline):
    seen = []
    options = short(steps=2) | {"flow_sampling": FlowSampling(2)}
    pipeline(
        PROMPT, 5, callback_on_step_end=lambda n, x: seen.append((n, tuple(x.shape))), **options
    )
    shapes = [(1, 4, 8, 6), (1, TRAINED.frames, 3, *TRAINED.size), (5, 4, 8, 6)]
    assert seen == list(enumerate(shape for shape in shapes for _ in range(2)))

    def stop(number, _):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPT, 5, callback_on_step_end=stop, **SHORT)


# A reference frame of the user's


def test_a_picture_is_what_stage_1_starts_from(pipeline, seen):
    given = picture()
    made = pipeline(PROMPT, 3, reference=given, **SHORT)
    latents = pipeline.vae.encode(given[None] * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(seen[0][2], latents * pipeline.vae.config.scaling_factor)
    assert torch.equal(made.reference, seen[0][2][0])
    # Stage 2 starts from ν all the same, and shows what it shows without the picture.
    assert relative(made.frames[0], pipeline(PROMPT, 3, **SHORT).frames[0]) < 1e-4


def test_a_picture_of_another_size_is_cropped_at_the_centre(pipeline, seen):
    small = picture(64, 48)
    wide = torch.cat([torch.zeros(3, 64, 20), small, torch.ones(3, 64, 20)], dim=2)
    pipeline(PROMPT, 2, reference=small, **SHORT)
    pipeline(PROMPT, 2, reference=wide, **SHORT)
    assert torch.equal(seen[3][2], seen[0][2])
    made = pipeline(PROMPT, 2, reference=picture(200, 30), height=33, width=50, **SHORT)
    assert made.reference.shape == (4, 5, 7)


def test_what_resizing_put_past_the_range_is_cut_off(pipeline, seen):
    given = picture().clamp(0.01, 1)
    given[:, 3:5] = 1
    pipeline(PROMPT, 2, reference=given, **SHORT)
    pipeline(PROMPT, 2, reference=torch.where(given == 1, 1 + 1e-6, given), **SHORT)
    assert torch.equal(seen[3][2], seen[0][2])


def test_a_pil_image_is_a_picture_too(pipeline, seen):
    pixels = (picture() * 255).byte()
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    pipeline(PROMPT, 2, reference=pixels.float() / 255, **SHORT)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # as a camera that was held upright notes it
    for reference in (image, image.convert("RGBA"), turned):
        seen.clear()
        pipeline(PROMPT, 2, reference=reference, **SHORT)
        latents = pipeline.vae.encode(pixels[None].float() / 127.5 - 1).latent_dist.mode()
        torch.testing.assert_close(seen[0][2], latents * pipeline.vae.config.scaling_factor)


# What is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ["one", "two"]}, "one prompt"),
        ({"num_frames": 0}, "1 to 64 frames, got 0"),
        ({"num_frames": -3}, "1 to 64 frames, got -3"),
        ({"num_frames": 65}, "got 65.*interpolate the frames"),
        ({"num_frames": 2.5}, r"1 to 64 frames, got 2\.5"),
        ({"flow_sampling": FlowSampling(0)}, "1 to 1000 steps of stage 1, .*got 0"),
        ({"flow_sampling": FlowSampling(1001)}, "1 to 1000 steps of stage 1, .*got 1001"),
        ({"sampling": {"steps": 0}}, r"steps: expected a whole number from 1 to 100000, got 0\."),
        ({"chunk_size": 0}, "chunk_size"),
        ({"output_type": "np"}, "output_type"),
        (
            {"flow_sampling": FlowSampling(sampler="euler")},
            "lfdm, got 'euler'",
        ),
        ({"height": -8}, "at least 1x1"),
        ({"flow_sampling": FlowSampling(motion_strength=-0.5)}, r"from 0, got -0\.5"),
        ({"flow_sampling": FlowSampling(motion_strength=float("nan"))}, "from 0, got nan"),
        ({"reference": "picture.png"}, "PIL image or a tensor, got str"),
        ({"reference": torch.zeros(2, 3, 8, 8)}, r"\(3, height, width\).*one frame"),
        ({"reference": torch.zeros(4, 8, 8)}, "alpha"),
        ({"reference": torch.zeros(1, 8, 8)}, "grey"),
        ({"reference": torch.zeros(3, 0, 8)}, r"\(3, 0, 8\)"),
        ({"reference": torch.full((3, 8, 8), 255, dtype=torch.uint8)}, "by 255"),
        ({"reference": torch.full((3, 8, 8), 255.0)}, "by 255"),
        ({"reference": torch.full((3, 8, 8), float("nan"))}, "from 0 to 1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_computed(pipeline, arguments, message):
    def fail(*_):
        pytest.fail("a step was computed")

    arguments = {"prompt": PROMPT, "callback_on_step_end": fail, **SHORT, **arguments}
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize("change", [{"motion_strength": False}, {"motion": 0.0}])
def test_motion_strength_needs_a_network_that_knows_it(tmp_path, change):
    generator = dataclasses.replace(TRAINED, **change)
    config = tiny_config(flow_generator=generator)
    pipeline = load(write_random_checkpoint(tmp_path / "tiny.safetensors", config))
    assert len(pipeline(PROMPT, 2, **SHORT).frames) == 2
    strong = SHORT | {"flow_sampling": FlowSampling(3, motion_strength=1.5)}
    with pytest.raises(ValueError, match=r"motion_strength: expected none, got 1\.5\."):
        pipeline(PROMPT, 2, **strong)


def test_a_generator_on_other_features_is_refused(tmp_path):
    generator = dataclasses.replace(TRAINED, reference_channels=256)
    config = tiny_config(flow_generator=generator)
    path = write_random_checkpoint(tmp_path / "tiny.safetensors", config)
    with pytest.raises(ValueError, match=r"expected 4 reference channels.*got 256"):
        TextToVideoPipeline.from_single_file(path)


# Weights and sizes


def test_stage_1_follows_weights_that_are_elsewhere(checkpoint, pipeline):
    """As accelerate's offloading leaves them: on no device between calls."""
    offloaded = load(checkpoint)
    cpu_offload(offloaded.text_encoder, torch.device("cpu"))
    expected = pipeline(PROMPT, 2, **SHORT).flow
    assert relative(offloaded(PROMPT, 2, **SHORT).flow.displacement, expected.displacement) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(pipeline, checkpoint, dtype):
    whole = pipeline(PROMPT, 2, **SHORT)
    half = load(checkpoint).to(dtype)(PROMPT, 2, **SHORT)
    assert half.frames.dtype == half.flow.displacement.dtype == torch.float32
    assert relative(half.reference, whole.reference) < 0.1
    assert torch.isfinite(half.frames).all()


def test_without_a_config_the_size_must_be_given(pipeline):
    bare = TextToVideoPipeline(**pipeline.components)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="Give both"):
        bare(PROMPT, 2, height=32, **SHORT)
    assert bare(PROMPT, 2, height=32, width=24, **SHORT).frames.shape == (2, 4, 4, 3)
