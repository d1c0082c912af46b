"""The diffusers pipeline: its contracts on a tiny model with random weights."""

from __future__ import annotations

import diffusers
import pytest
import torch
from compare import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import tiny_config, write_random_checkpoint
from safetensors.torch import load_file

from s2dm.flow import FlowField
from s2dm.models import FUSIONS, SamplingConfig
from s2dm.models.checkpoint import read_config
from s2dm.pipelines import FlowToVideoPipeline
from s2dm.pipelines.denoiser import predict
from s2dm.sector import SHARED, NoiseSharing

PROMPT = "A man wearing a red coat and blue jeans is squat"


def load(path) -> FlowToVideoPipeline:
    pipeline = FlowToVideoPipeline.from_single_file(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return write_random_checkpoint(path, tiny_config(flow_generator=None))


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> FlowToVideoPipeline:
    torch.set_num_threads(1)
    return load(checkpoint)


def sliding_flow(frames: int, height: int, width: int) -> FlowField:
    """A clip whose left half slides to the right, a little further in every frame."""
    displacement = torch.zeros(frames, 2, height, width)
    displacement[:, 0, :, : width // 2] = -torch.arange(frames).view(-1, 1, 1) * 1.5
    return FlowField(displacement, torch.zeros(frames, 1, height, width))


def short(**sampling) -> dict:
    """Arguments of a call that takes little time, with these entries of its sampling."""
    return dict(sampling={"steps": 3, **sampling}, seed=1, output_type="latent")


SHORT = short()


def test_frames_have_the_shape_and_range_of_a_clip(pipeline):
    flow = sliding_flow(5, 64, 48)
    frames = pipeline(PROMPT, flow, sampling={"steps": 2}, seed=0).frames
    assert frames.shape == (5, 3, 64, 48)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() and frames.max() <= 1
    pictures = pipeline(PROMPT, flow, sampling={"steps": 2}, seed=0, output_type="pil").frames
    assert [picture.size for picture in pictures] == [(48, 64)] * 5
    latents = pipeline(PROMPT, flow, **SHORT).frames
    assert latents.shape == (5, 4, 8, 6)


def test_a_seed_fixes_the_result_and_another_changes_it(pipeline):
    flow = sliding_flow(2, 32, 32)
    options = dict(sampling={"steps": 2}, output_type="latent")
    first = pipeline(PROMPT, flow, seed=7, **options).frames
    assert torch.equal(first, pipeline(PROMPT, flow, seed=7, **options).frames)
    assert relative(pipeline(PROMPT, flow, seed=8, **options).frames, first) > 0.1
    assert relative(pipeline(PROMPT, flow, **options).frames, first) > 0.1


def test_prompt_flow_and_guidance_all_matter(pipeline):
    flow = sliding_flow(3, 32, 32)
    base = pipeline(PROMPT, flow, **SHORT).frames
    changed = {
        "prompt": pipeline("A woman", flow, **SHORT).frames,
        "flow": pipeline(PROMPT, flow.scale(3), **SHORT).frames,
        "guidance": pipeline(PROMPT, flow, **short(guidance_scale=1.0)).frames,
        "negative": pipeline(PROMPT, flow, negative_prompt="red coat", **SHORT).frames,
    }
    for name, latents in changed.items():
        assert relative(latents, base) > 1e-4, name


@pytest.mark.parametrize(
    "scheduler", ["DDIM", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM", "DDPM"]
)
def test_equal_conditions_give_equal_frames_with_shared_noise(pipeline, scheduler):
    still = FlowField.zeros(3, 32, 32)
    before = pipeline.scheduler
    try:
        pipeline.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(before.config)
        shared = pipeline(PROMPT, still, **SHORT).frames
        own = pipeline(PROMPT, still, noise_sharing=NoiseSharing("independent"), **SHORT).frames
    finally:
        pipeline.scheduler = before
    assert (shared - shared[:1]).abs().max() < 1e-4 * shared.std()
    assert relative(own[1], own[0]) > 0.1  # the control: the test can fail


def test_first_frame_does_not_depend_on_the_rest_of_the_clip(pipeline):
    """The reference frame of stage 1 and frame 1 of the clip are one picture."""
    one = pipeline(PROMPT, FlowField.zeros(1, 32, 32), **SHORT).frames
    clip = pipeline(PROMPT, sliding_flow(6, 32, 32), **SHORT).frames
    assert relative(clip[:1], one) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
def test_chunks_change_nothing(pipeline, chunk_size):
    flow = sliding_flow(7, 32, 32)
    whole = pipeline(PROMPT, flow, chunk_size=7, **SHORT).frames
    assert relative(pipeline(PROMPT, flow, chunk_size=chunk_size, **SHORT).frames, whole) < 1e-5


@settings(max_examples=6, deadline=None)
@given(
    frames=st.integers(1, 4),
    height=st.integers(9, 70),
    width=st.integers(9, 70),
    chunk=st.integers(1, 5),
)
def test_any_size_and_any_number_of_frames(pipeline, frames, height, width, chunk):
    flow = sliding_flow(frames, height, width)
    clip = pipeline(PROMPT, flow, sampling={"steps": 1}, seed=0, chunk_size=chunk).frames
    assert clip.shape == (frames, 3, height, width)
    assert torch.isfinite(clip).all()


@pytest.mark.parametrize("frames", [1, 17])
def test_sizes_of_the_contract(pipeline, frames):
    clip = pipeline(PROMPT, sliding_flow(frames, 96, 120), sampling={"steps": 1}, seed=0).frames
    assert clip.shape == (frames, 3, 96, 120)


def test_size_follows_the_arguments_whatever_the_size_of_the_flow(pipeline):
    """A pan is the same condition at every size."""
    small, large = torch.zeros(3, 2, 32, 32), torch.zeros(3, 2, 96, 96)
    small[1:, 0], large[1:, 0] = 4, 12
    fields = [FlowField(d, torch.zeros(3, 1, *d.shape[2:])) for d in (small, large)]
    first, second = (pipeline(PROMPT, f, height=32, width=40, **SHORT).frames for f in fields)
    assert first.shape == (3, 4, 4, 5)
    assert relative(second, first) < 1e-4


def test_long_prompts_are_encoded_in_pieces(pipeline):
    short = pipeline.encode_prompt(PROMPT)
    long = pipeline.encode_prompt(" ".join([PROMPT] * 12))
    assert short.shape == (1, 77, 64)
    assert long.shape[1] % 77 == 0 and long.shape[1] > 77
    clip = pipeline(" ".join([PROMPT] * 12), sliding_flow(2, 32, 32), **SHORT).frames
    assert torch.isfinite(clip).all()
    assert pipeline.encode_prompt("").shape == (1, 77, 64)


def test_prompt_is_encoded_as_the_tokenizer_pads_it(pipeline):
    ids = pipeline.tokenizer(
        PROMPT, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    expected = pipeline.text_encoder(ids).last_hidden_state
    assert torch.equal(pipeline.encode_prompt(PROMPT), expected)


def test_a_prompt_that_is_repeated_whole_means_the_same(pipeline):
    """Positive and negative prompts of different lengths are evaluated in one batch."""
    flow = sliding_flow(2, 32, 32)
    tokens = pipeline.encode_flow(flow)
    text = pipeline.encode_prompt(PROMPT)
    noise = SHARED.draw(2, (4, 4, 4), torch.Generator().manual_seed(0)).contiguous()
    frames, step = torch.arange(2), torch.tensor(500)
    once = predict(pipeline.unet, noise, step, [(text, tokens)], frames)[0]
    twice = predict(pipeline.unet, noise, step, [(text.repeat(1, 2, 1), tokens)], frames)[0]
    assert relative(twice, once) < 1e-5


def test_flow_guidance_of_its_own_reduces_to_the_common_one(pipeline):
    flow = sliding_flow(2, 32, 32)
    common = pipeline(PROMPT, flow, **short(guidance_scale=4.0)).frames
    # Equal scales take a shorter way: these two are as good as equal.
    same, other = (
        pipeline(PROMPT, flow, **short(guidance_scale=4.0, flow_guidance_scale=scale)).frames
        for scale in (4.000001, 1.0)
    )
    assert relative(same, common) < 1e-4
    assert relative(other, common) > 1e-3


@pytest.mark.parametrize("flow_scale", [None, 1.0])
def test_without_guidance_there_is_one_prediction(pipeline, flow_scale):
    flow = sliding_flow(2, 32, 32)
    batches = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        pipeline(PROMPT, flow, **short(guidance_scale=1.0, flow_guidance_scale=flow_scale))
    finally:
        hook.remove()
    assert max(batches) == len(flow)


def test_what_is_not_given_is_as_the_checkpoint_recommends(pipeline, tmp_path):
    def clip(made_by, sampling=None):
        latents = []
        made_by(
            PROMPT,
            flow,
            sampling=sampling,
            seed=1,
            output_type="latent",
            callback_on_step_end=lambda _, x: latents.append(x),
        )
        return latents

    flow = sliding_flow(2, 32, 32)
    recommended = SamplingConfig(2, 3.0, 1.5, 0.5)
    path = write_random_checkpoint(
        tmp_path / "recommends.safetensors",
        tiny_config(flow_generator=None, sampling=recommended),
    )
    load(path).save_pretrained(tmp_path / "folder")
    told = clip(
        pipeline,
        {"steps": 2, "guidance_scale": 3.0, "flow_guidance_scale": 1.5, "flow_start": 0.5},
    )
    assert torch.equal(clip(pipeline, recommended)[-1], told[-1])
    for source in (load(path), FlowToVideoPipeline.from_pretrained(tmp_path / "folder")):
        assert source.sampling == recommended
        assert [relative(a, b) < 1e-6 for a, b in zip(clip(source), told, strict=True)] == [
            True
        ] * 2
        for change in ({"guidance_scale": 2.0}, {"flow_guidance_scale": 1.0}, {"flow_start": 0.0}):
            assert relative(clip(source, change)[-1], told[-1]) > 1e-4
        assert len(clip(source, {"steps": 1})) == 1
        # A whole config stands for itself: none of its entries is the checkpoint's.
        plain = SamplingConfig(2, 4.0)
        assert relative(clip(source, plain)[-1], clip(pipeline, plain)[-1]) < 1e-6
        # The paper's guidance is one number for both.
        joint = clip(pipeline, {"steps": 2, "guidance_scale": 4.0, "flow_start": 0.5})
        both = clip(source, {"guidance_scale": 4.0, "flow_guidance_scale": 4.0})
        assert relative(both[-1], joint[-1]) < 1e-6


def test_frames_part_when_the_flow_starts(pipeline):
    def latents(flow, **sampling):
        seen = []
        options = short(steps=4, **sampling)
        pipeline(PROMPT, flow, callback_on_step_end=lambda _, x: seen.append(x), **options)
        return seen

    flow, other = sliding_flow(3, 32, 32), FlowField.zeros(3, 32, 32)
    with_flow = latents(flow)
    assert torch.equal(with_flow[-1], latents(flow, flow_start=0.0)[-1])
    never = latents(flow, flow_start=1.0)
    assert torch.equal(never[-1], latents(other, flow_start=1.0)[-1])
    half = latents(flow, flow_start=0.5)
    assert len(half) == 4
    for step, part in enumerate(half):
        assert (relative(part, part[:1].expand_as(part)) < 1e-5) == (step < 2)
        assert (relative(part, never[step]) < 1e-6) == (step < 2)
        assert relative(part, with_flow[step]) > 1e-5


def test_a_flow_that_never_starts_stays_away_to_the_last_timestep(pipeline, monkeypatch):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    one, other = (
        pipeline(PROMPT, flow, **short(flow_start=1.0)).frames
        for flow in (sliding_flow(2, 32, 32), FlowField.zeros(2, 32, 32))
    )
    assert scheduler.timesteps[-1] == 0 and torch.equal(one, other)


def test_without_a_recommendation_it_is_the_papers(pipeline):
    assert pipeline.sampling == SamplingConfig(20, 7.5, None, 0.0)
    parts = {name: getattr(pipeline, name) for name in pipeline.components}
    assert FlowToVideoPipeline(**parts).sampling == SamplingConfig()


def test_progress_is_reported_and_can_stop_the_run(pipeline):
    seen = []

    def stop(number, latents):
        seen.append((number, tuple(latents.shape)))
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPT, sliding_flow(2, 32, 32), callback_on_step_end=stop, **SHORT)
    assert seen == [(0, (2, 4, 4, 4)), (1, (2, 4, 4, 4))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output_type": "np"}, "output_type"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"sampling": {"steps": 0}}, r"steps: expected a whole number from 1 to 100000, got 0\."),
        ({"sampling": {"flow_start": 1.5}}, r"flow_start: expected a number from 0 to 1, got 1\.5"),
        ({"sampling": {"guidance_scale": None}}, "guidance_scale: expected a number from 0, got"),
        ({"sampling": {"cfg": 2.0}}, "SamplingConfig: unknown setting 'cfg'; it has: steps"),
        ({"prompt": ["one", "two"]}, "one prompt"),
    ],
)
def test_wrong_arguments_are_refused(pipeline, arguments, message):
    arguments = {"prompt": PROMPT, "flow": FlowField.zeros(2, 32, 32), **arguments}
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_folder_round_trip(pipeline, tmp_path):
    flow = sliding_flow(2, 32, 32)
    pipeline.save_pretrained(tmp_path / "folder")
    again = FlowToVideoPipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(PROMPT, flow, **SHORT).frames, pipeline(PROMPT, flow, **SHORT).frames)
    assert again.config.s2dm_config["resolution"] == [64, 48]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_single_file_round_trip(tmp_path, fusion):
    flow = sliding_flow(2, 32, 32)
    config = tiny_config(fusion, flow_generator=None)
    pipeline = load(write_random_checkpoint(tmp_path / "first.safetensors", config))
    pipeline.save_single_file(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    clip = pipeline(PROMPT, flow, **SHORT).frames
    assert torch.equal(again(PROMPT, flow, **SHORT).frames, clip)
    half = tmp_path / "half.safetensors"
    again.save_single_file(half, dtype=torch.float16)
    assert half.stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size
    FlowToVideoPipeline.from_single_file(half)


@torch.no_grad()
def test_a_folder_keeps_spatial_features_and_any_size_follows_the_flow(tmp_path):
    """Chunks, sizes that are no whole latents, and a flow of another size than the clip."""
    flow = sliding_flow(3, 32, 32)
    config = tiny_config("channel+spatial", flow_generator=None)
    pipeline = load(write_random_checkpoint(tmp_path / "first.safetensors", config))
    settings = {**SHORT, "height": 52, "width": 76}
    clip = pipeline(PROMPT, flow, **settings).frames
    assert clip.shape == (3, 4, 7, 10)  # latents
    chunks = pipeline(PROMPT, flow, chunk_size=1, **settings).frames
    torch.testing.assert_close(chunks, clip, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "folder")
    again = FlowToVideoPipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(PROMPT, flow, **settings).frames, clip)
    assert pipeline.encode_flow(flow).shape[1] == 77 + 4 * 4 + 2 * 2


def test_folder_and_file_hold_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "folder")
    from_folder = FlowToVideoPipeline.from_pretrained(tmp_path / "folder")
    from_folder.save_single_file(tmp_path / "a.safetensors")
    pipeline.save_single_file(tmp_path / "b.safetensors")
    first, second = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_config(tmp_path / "a.safetensors") == read_config(tmp_path / "b.safetensors")


def test_a_pipeline_without_config_says_why_it_cannot_write_a_file(pipeline, tmp_path):
    bare = FlowToVideoPipeline(**pipeline.components)
    with pytest.raises(ValueError, match="s2dm_config"):
        bare.save_single_file(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    clip = bare(PROMPT, FlowField.zeros(1, 32, 32), sampling={"steps": 1}, seed=0).frames
    assert clip.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(pipeline, checkpoint, dtype):
    flow = sliding_flow(2, 32, 32)
    whole = pipeline(PROMPT, flow, **short(guidance_scale=2.0)).frames
    half = load(checkpoint).to(dtype)
    latents = half(PROMPT, flow, **short(guidance_scale=2.0)).frames
    assert latents.dtype == torch.float32
    assert relative(latents, whole) < 0.1


def test_the_flow_stays_when_diffusers_changes_the_attention(checkpoint):
    pipeline = load(checkpoint)
    flow = sliding_flow(3, 64, 64)
    before = pipeline(PROMPT, flow, **SHORT).frames
    pipeline.enable_attention_slicing()
    assert relative(pipeline(PROMPT, flow, **SHORT).frames, before) < 1e-5
    pipeline.unet.fuse_qkv_projections()
    assert relative(pipeline(PROMPT, flow, **SHORT).frames, before) < 1e-5
    still = pipeline(PROMPT, FlowField.zeros(3, 64, 64), **SHORT).frames
    assert relative(still, before) > 1e-3


def test_a_folder_of_half_precision_runs(checkpoint, tmp_path):
    FlowToVideoPipeline.from_single_file(checkpoint, torch.float16).save_pretrained(tmp_path)
    pipeline = FlowToVideoPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    flow = sliding_flow(2, 64, 64)
    got = pipeline(PROMPT, flow, **SHORT).frames
    assert relative(got, load(checkpoint)(PROMPT, flow, **SHORT).frames) < 2e-2


def test_no_negative_prompt_is_an_empty_one(pipeline):
    flow = sliding_flow(2, 64, 64)
    options = short(guidance_scale=3.0)
    none = pipeline(PROMPT, flow, None, **options).frames
    assert torch.equal(none, pipeline(PROMPT, flow, "", **options).frames)


@pytest.mark.parametrize("steps", [400, 600, 1000])
def test_steps_that_do_not_cover_the_schedule_are_refused(pipeline, steps):
    with pytest.raises(ValueError, match=f"{steps} steps don't cover the 1000 timesteps"):
        pipeline(PROMPT, sliding_flow(2, 64, 64), sampling={"steps": steps})
