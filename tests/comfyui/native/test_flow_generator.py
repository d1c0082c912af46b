"""Generate Flow (stage 1) in a real ComfyUI, alone and with the clip that follows it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from compare import relative
from random_checkpoint import TINY, random_states, tiny_config, write_random_checkpoint

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.flow import FlowField
from s2dm.models import Checkpoint, decode_flow, load_checkpoint, save_checkpoint
from s2dm.pipelines import embed_prompts, flow_scheduler, generate_flow
from s2dm.pipelines.modules import build, build_tokenizer
from s2dm.sector import seed_of_flow

pytestmark = pytest.mark.comfyui

PROMPT = "a man in a red shirt is walking"
TOLERANCE = 1e-3


def picture(height: int = 64, width: int = 48, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """A smooth picture, (1, height, width, channels)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 4, generator=generator)
    size = {"size": (height, width), "mode": "bilinear"}
    return torch.nn.functional.interpolate(coarse, **size).movedim(1, -1)


@pytest.fixture(scope="module")
def text_in_float32(comfy):
    """On a CPU, core rounds the weights of text encoders to float16 unless told not to."""
    from comfy.cli_args import args

    before, args.fp32_text_enc = args.fp32_text_enc, True
    yield
    args.fp32_text_enc = before


@pytest.fixture(scope="module")
def loaded(rig, text_in_float32, tmp_path_factory):
    """Load a checkpoint with these changes to its flow generator."""
    folder = tmp_path_factory.mktemp("stage1")

    def load(changes):
        config = tiny_config(flow_generator=dataclasses.replace(TINY.flow_generator, **changes))
        path = write_random_checkpoint(
            folder / f"{len(list(folder.iterdir()))}.safetensors", config
        )
        return type(rig)(rig.pack, rig.nodes, path)

    return load


@pytest.fixture(scope="module")
def tiny(loaded):
    return loaded({})


def generate(rig, reference=None, prompt=PROMPT, **inputs):
    """Run the node, three steps of DDIM unless told."""
    arguments = {"frames": 4, "steps": 3, "cfg": 1.0, "seed": 7, "sampler_name": "ddim", **inputs}
    (flow,) = rig.run(
        "S2DMGenerateFlow",
        flow_generator=rig.loaded.stage1,
        reference=picture() if reference is None else reference,
        prompt=prompt,
        **arguments,
    )
    return flow


def by_diffusers(rig, reference, prompt, steps, cfg, seed, motion_strength, sampler_name):
    """The same flow from the other engine, which reads the same file."""
    checkpoint = load_checkpoint(rig.checkpoint)
    settings = checkpoint.config.flow_generator
    encoder, vae, network = (
        build(checkpoint, part) for part in ("text_encoder", "vae", "flow_generator")
    )
    motion = torch.tensor([motion_strength * settings.motion]) if motion_strength else None
    with torch.no_grad():
        latents = vae.encode(reference.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    text = None
    if prompt.strip():
        tokenizer = build_tokenizer(checkpoint.config)
        text = embed_prompts(encoder, tokenizer, [prompt]).detach()
    sample = generate_flow(
        network,
        flow_scheduler(settings.schedule, sampler_name),
        text,
        latents * checkpoint.config.vae.scaling_factor,
        steps,
        cfg,
        torch.Generator().manual_seed(seed_of_flow(seed)),
        motion,
    )
    return decode_flow(sample[0], settings, *reference.shape[1:3])


CASES = {
    "plain": {},
    "guided": {"cfg": 3.0},
    "solver": {"sampler_name": "dpmpp_2m", "steps": 8, "cfg": 2.0},
    "motion": {"motion_strength": 1.5},
    # With steps that don't divide 1000, DDIM of diffusers jumps past its own timesteps.
    "uneven steps": {"steps": 7, "sampler_name": "dpmpp_2m"},
    "one step": {"steps": 1},
    "long prompt": {"prompt": " ".join([PROMPT] * 12)},
    "no prompt": {"prompt": "  \n", "cfg": 3.0},
    "weights without effect": {"prompt": "a man (in:1.0) a red shirt"},
    "seed": {"seed": 2**40 + 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_engines_agree(tiny, case):
    inputs = {
        "prompt": PROMPT,
        "steps": 20,
        "cfg": 1.0,
        "seed": 3,
        "motion_strength": 0.0,
        "sampler_name": "ddim",
        **case,
    }
    ours = generate(tiny, **inputs)
    inputs["prompt"] = inputs["prompt"].replace("(in:1.0)", "in")
    theirs = by_diffusers(tiny, picture(), **inputs)
    assert relative(ours.condition(16, 16), theirs.condition(16, 16)) <= TOLERANCE


SETTINGS = {
    "noise": {
        "schedule": dataclasses.replace(TINY.flow_generator.schedule, prediction_type="epsilon"),
    },
    "threshold": {"threshold": 0.9},
    "as LFDM": {"norm": "clip", "null_text": "zero", "null_reference": "zero"},
    "no motion strength": {"motion_strength": False},
}
SETTINGS["noise"]["schedule"] = dataclasses.replace(
    SETTINGS["noise"]["schedule"], beta_schedule="scaled_linear"
)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_engines_agree_on_every_kind_of_network(loaded, settings):
    rig = loaded(settings)
    for prompt in (PROMPT, ""):
        inputs = {"prompt": prompt, "steps": 10, "cfg": 2.0, "seed": 3, "sampler_name": "ddim"}
        ours = generate(rig, **inputs)
        theirs = by_diffusers(rig, picture(), motion_strength=0.0, **inputs)
        assert relative(ours.displacement, theirs.displacement) <= TOLERANCE, prompt


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_the_engines_agree_on_the_bundled_checkpoint(rig, text_in_float32, sampler):
    bundled = type(rig)(rig.pack, rig.nodes, DEFAULT_CHECKPOINT)
    if bundled.loaded.stage1 is None:
        pytest.skip("the bundled checkpoint holds stage 2 alone (no part flow_generator)")
    prompt = "A woman, wearing a red jumper and black trousers is squat"
    inputs = {"steps": 20, "cfg": 3.0, "seed": 3, "sampler_name": sampler}
    ours = generate(bundled, picture(128, 128), prompt, frames=16, **inputs)
    theirs = by_diffusers(bundled, picture(128, 128), prompt, motion_strength=0.0, **inputs)
    assert relative(ours.displacement, theirs.displacement) <= TOLERANCE


def test_every_input_counts(tiny):
    """What makes agreement of the engines more than a coincidence."""
    base = generate(tiny, cfg=2.0)
    assert base.displacement.abs().max() > 0
    others = {
        "prompt": generate(tiny, prompt="a woman is sitting", cfg=2.0),
        "reference": generate(tiny, picture(seed=1), cfg=2.0),
        "cfg": generate(tiny, cfg=4.0),
        "seed": generate(tiny, cfg=2.0, seed=8),
        "steps": generate(tiny, cfg=2.0, steps=4),
        "motion_strength": generate(tiny, cfg=2.0, motion_strength=2.0),
        "sampler_name": generate(tiny, cfg=2.0, sampler_name="dpmpp_2m"),
    }
    for name, flow in others.items():
        assert relative(flow.displacement, base.displacement) > 10 * TOLERANCE, name


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 16, 64])
def test_any_number_of_frames(tiny, frames):
    """The network makes its four frames, and they are retimed."""
    flow = generate(tiny, frames=frames)
    assert flow.num_frames == frames
    assert torch.equal(flow.displacement, generate(tiny).retime(frames).displacement)


def test_the_first_frame_is_still(tiny):
    flow = generate(tiny, frames=6)
    assert not flow.displacement[0].any() and not flow.occlusion[0].any()
    assert flow.displacement[1:].abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize(("height", "width"), [(64, 48), (100, 52), (31, 97), (8, 8), (256, 192)])
def test_the_flow_is_as_large_as_the_reference(tiny, height, width):
    flow = generate(tiny, picture(height, width))
    assert (flow.height, flow.width) == (height, width)
    assert torch.isfinite(flow.displacement).all()


def test_a_larger_reference_moves_alike(tiny):
    """Twice as large and stretched to the same picture: the same motion in half-frames."""
    small = picture(64, 48)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    one, other = generate(tiny, small).condition(16, 16), generate(tiny, large).condition(16, 16)
    assert relative(other, one) < 0.05
    assert relative(generate(tiny, picture(128, 96, seed=1)).condition(16, 16), one) > 0.05


def test_alpha_and_further_frames_are_dropped_and_grey_is_a_colour(tiny):
    colour = picture()
    base = generate(tiny, colour).displacement
    alpha = torch.cat([colour, torch.rand(1, 64, 48, 1)], dim=-1)
    assert torch.equal(generate(tiny, alpha).displacement, base)
    clip = torch.cat([colour, picture(seed=2)])
    assert torch.equal(generate(tiny, clip).displacement, base)
    grey = picture(channels=1)
    same = generate(tiny, grey.expand(-1, -1, -1, 3)).displacement
    assert relative(generate(tiny, grey).displacement, same) < 1e-4


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_an_empty_prompt_is_the_null_label(tiny, blank):
    flow = generate(tiny, prompt=blank, cfg=1.0)
    # Guidance from the null label to itself changes nothing.
    assert relative(generate(tiny, prompt=blank, cfg=5.0).displacement, flow.displacement) < 1e-4
    # And cfg 0 is the null label, whatever the prompt.
    assert relative(generate(tiny, cfg=0.0).displacement, flow.displacement) < 1e-4
    assert relative(generate(tiny).displacement, flow.displacement) > TOLERANCE


WRONG = {
    "one frame": ({"frames": 1}, r"at least 2 frames, got 1\. .*without a flow"),
    "too many frames": ({"frames": 65}, r"to 64 frames, got 65\. .*interpolate the frames"),
    "no steps": ({"steps": 0}, r"1 to 1000 steps of stage 1.*got 0"),
    "too many steps": ({"steps": 1001}, r"1 to 1000 steps of stage 1.*got 1001"),
    "two channels": ({"reference": torch.zeros(1, 8, 8, 2)}, r"reference: .*\(1, 8, 8, 2\)"),
    "no frame": ({"reference": torch.zeros(0, 8, 8, 3)}, r"reference: .*\(0, 8, 8, 3\)"),
    "not a picture": ({"reference": torch.zeros(8, 8, 3)}, r"reference: .*\(8, 8, 3\)"),
    "broken picture": ({"reference": torch.full((1, 64, 48, 3), torch.nan)}, "aren't finite"),
    "sampler": ({"sampler_name": "lms"}, r"among dpmpp_2m, ddim, lfdm, got 'lms'"),
}


@pytest.mark.parametrize(("inputs", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_input_is_named(tiny, inputs, message):
    with pytest.raises(ValueError, match=rf"(?s)^Generate Flow \(S2DM\): .*{message}"):
        generate(tiny, **inputs)
    assert generate(tiny).num_frames == 4


def test_a_network_without_motion_strength_says_so(loaded):
    for settings in ({"motion_strength": False}, {"motion": 0.0}):
        rig = loaded(settings)
        assert generate(rig).num_frames == 4
        with pytest.raises(
            ValueError, match=r"^Generate Flow \(S2DM\): motion_strength: expected none, got 2\."
        ):
            generate(rig, motion_strength=2.0)


def test_a_checkpoint_without_stage_1_says_what_to_do(rig, tmp_path, monkeypatch):
    import folder_paths

    folder_paths.add_model_folder_path("s2dm", str(tmp_path))
    write_random_checkpoint(tmp_path / "stage2.safetensors", tiny_config(flow_generator=None))
    folder_paths.filename_list_cache.pop("s2dm", None)
    *_, nothing = rig.run("S2DMCheckpointLoader", checkpoint="stage2.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^Generate Flow \(S2DM\): .*stage2\.safetensors holds stage 2 alone.*Estimate Flow",
    ):
        rig.run("S2DMGenerateFlow", flow_generator=nothing, reference=picture(), prompt=PROMPT)


def test_a_network_for_other_features_is_refused(rig, tmp_path):
    """LFDM's, for one, which sees features of its own encoder."""
    generator = dataclasses.replace(TINY.flow_generator, reference_channels=256)
    path = write_random_checkpoint(
        tmp_path / "lfdm.safetensors", tiny_config(flow_generator=generator)
    )
    with pytest.raises(ValueError, match=r"expected 4 reference channels.*got 256"):
        rig.module("nodes.native.loading").load_all(str(path))


def test_every_weight_arrives(tiny):
    state = load_checkpoint(tiny.checkpoint)["flow_generator"].state
    arrived = tiny.loaded.stage1.network.model.diffusion_model.network.state_dict()
    assert set(arrived) == set(state)
    for name, weight in state.items():
        assert torch.equal(arrived[name], weight), name


def test_half_precision_files_are_sampled_in_float32(rig, tmp_path):
    config = tiny_config()
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, Checkpoint(config, random_states(config)), torch.float16)
    half = type(rig)(rig.pack, rig.nodes, path)
    assert half.loaded.stage1.network.model_dtype() is torch.float32
    assert torch.isfinite(generate(half).displacement).all()


# ---------------------------------------------------------------- model management


def test_twice_is_the_same_and_nothing_stays_behind(tiny):
    stage1 = tiny.loaded.stage1
    model, clip, vae = tiny.loaded.model, tiny.loaded.clip, tiny.loaded.vae
    patchers = (stage1.network, model, clip.patcher, vae.patcher)

    def state():
        return [
            (
                sorted(vars(patcher.model)),
                copy.copy(patcher.model_options),
                {name: dict(found) for name, found in patcher.wrappers.items()},
                dict(patcher.patches),
            )
            for patcher in patchers
        ]

    encoded = tiny.encode(tiny.flow(3))
    first = generate(tiny, cfg=2.0)
    clip_before, before = tiny.sample(encoded), state()
    second = generate(tiny, cfg=2.0)
    assert torch.equal(first.displacement, second.displacement)
    assert state() == before
    assert torch.equal(tiny.sample(encoded), clip_before)
    assert stage1.network.model.current_patcher is None


def test_the_global_generator_is_left_alone(tiny):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    generate(tiny)
    assert torch.equal(torch.rand(3), expected)


def test_it_is_loaded_by_core_and_works_again_after_it_was_unloaded(tiny):
    import comfy.model_management as management

    first = generate(tiny)
    assert any(
        entry.model is tiny.loaded.stage1.network for entry in management.current_loaded_models
    )
    management.unload_all_models()
    assert not management.current_loaded_models
    assert torch.equal(generate(tiny).displacement, first.displacement)


def test_it_is_loaded_whole_even_where_core_would_load_a_part(tiny):
    network = tiny.loaded.stage1.network
    network.detach()
    network.partially_load(torch.device("cpu"), extra_memory=0.1)
    assert network.loaded_size() == network.model_size()
    assert not network.model.model_lowvram
    assert network.partially_unload(torch.device("cpu"), 1) == 0
    network.detach()


def test_progress_is_reported_and_cancel_stops_at_once(tiny, monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    seen = []
    bar = comfy.utils.ProgressBar

    class Recorded(bar):
        def update_absolute(self, value, total=None, preview=None):
            seen.append((value, total))
            if cancel_at == value:
                management.interrupt_current_processing(True)

    monkeypatch.setattr(comfy.utils, "ProgressBar", Recorded)
    cancel_at = None
    generate(tiny, steps=3)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    cancel_at = 2
    try:
        with pytest.raises(management.InterruptProcessingException):
            generate(tiny, steps=50)
    finally:
        management.interrupt_current_processing(False)
    assert seen == [(1, 50), (2, 50)]
    assert tiny.loaded.stage1.network.model.current_patcher is None
    cancel_at = None
    assert generate(tiny).num_frames == 4


# ------------------------------------------------------------------- with stage 2


def reference_frame(rig, height=64, width=48, **settings):
    """Latents of the first stage: one frame, no flow connected."""
    still = rig.run(
        "S2DMEncodeFlow",
        positive=rig.prompt(),
        negative=rig.prompt(""),
        width=width,
        height=height,
    )
    return rig.sample(still, **settings)


def reference_and_clip(rig, flow_of, **settings):
    """Latents of a reference frame, and of the clip of a flow that was made for it."""
    reference = reference_frame(rig, **settings)
    settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
    with torch.inference_mode():
        flow = flow_of(rig.loaded.vae.decode(reference))
    return reference, rig.sample(rig.encode(flow), **settings)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"])
def test_frame_1_of_the_clip_is_the_reference_frame(tiny, sampler):
    settings = {"seed": 11, "steps": 6, "cfg": 2.0, "sampler_name": sampler}
    reference, clip = reference_and_clip(
        tiny, lambda image: generate(tiny, image, frames=5), **settings
    )
    assert reference.shape == (1, 4, 8, 6) and clip.shape == (5, 4, 8, 6)
    # Latents of random weights have no scale of their own.
    assert (clip[:1] - reference).abs().max() <= 1e-4 * reference.std()
    # Not because all frames are the same.
    assert (clip[1:] - reference).abs().amax((1, 2, 3)).min() > 0.1 * reference.std()


@pytest.mark.slow
def test_frame_1_is_the_reference_frame_of_the_bundled_checkpoint(rig):
    """Whether or not it holds stage 1: the flow of a user's clip begins at the frame as well."""
    bundled = type(rig)(rig.pack, rig.nodes, DEFAULT_CHECKPOINT)
    settings = {"seed": 11, "steps": 20, "cfg": 7.5, "height": 128, "width": 128}
    generated = bundled.loaded.stage1 is not None
    reference, clip = reference_and_clip(
        bundled,
        lambda image: (
            generate(bundled, image, steps=20, frames=16)
            if generated
            else bundled.flow(16, 128, 128)
        ),
        **settings,
    )
    assert (clip[:1] - reference).abs().max() <= 1e-4
    assert (clip[1:] - reference).abs().amax((1, 2, 3)).min() > 0.1


def test_without_a_flow_the_size_must_be_given(tiny):
    prompts = {"positive": tiny.prompt(), "negative": tiny.prompt("")}
    with pytest.raises(ValueError, match=r"^Encode Flow \(S2DM\): .*width.*height"):
        tiny.run("S2DMEncodeFlow", width=64, **prompts)


def test_no_flow_is_the_flow_of_a_still_frame(tiny):
    still = FlowField.zeros(1, 64, 48)
    connected = tiny.module("s2dm.flow").FlowField(still.displacement, still.occlusion)
    assert torch.equal(tiny.sample(tiny.encode(connected), seed=7), reference_frame(tiny, seed=7))
