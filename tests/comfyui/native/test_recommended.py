"""Widgets left as they are sample as the checkpoint recommends, like the pipeline's defaults."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm.flow import FlowField
from s2dm.pipelines import FlowToVideoPipeline

pytestmark = pytest.mark.comfyui

PROMPT = "a man in a red shirt is walking"
TOLERANCE = 1e-3
RECOMMENDATIONS = [
    {"steps": 4},  # and the paper's guidance, 7.5 of both together
    {"steps": 5, "guidance_scale": 1.75, "flow_guidance_scale": 1.0, "flow_start": 0.15},
    {"steps": 4, "guidance_scale": 5.0, "flow_guidance_scale": 2.0},
    {"steps": 4, "guidance_scale": 2.0, "flow_guidance_scale": 6.0, "flow_start": 0.3},
    {"steps": 4, "guidance_scale": 3.0, "flow_guidance_scale": 0.0},
    {"steps": 4, "guidance_scale": 1.0, "flow_guidance_scale": 3.0},
    {"steps": 4, "guidance_scale": 1.0},
    {"steps": 4, "guidance_scale": 0.0, "flow_guidance_scale": 1.0},
]


@pytest.fixture(scope="module", autouse=True)
def text_in_float32(comfy):
    """On a CPU, core rounds the weights of text encoders to float16 unless told not to."""
    from comfy.cli_args import args

    before, args.fp32_text_enc = args.fp32_text_enc, True
    yield
    args.fp32_text_enc = before


@pytest.fixture
def recommending(rig, text_in_float32, tmp_path):
    """The tiny checkpoint with a recommendation, on the nodes."""

    def make(**entries):
        config = tiny_config(flow_generator=None).recommending(entries)
        path = write_random_checkpoint(tmp_path / f"{len(entries)}.safetensors", config)
        return type(rig)(rig.pack, rig.nodes, path)

    return make


def defaults(rig, node_id):
    """What the widgets of a node show at first."""
    inputs = rig.nodes[node_id].GET_SCHEMA().inputs
    values = {socket.id: getattr(socket, "default", None) for socket in inputs}
    return {name: value for name, value in values.items() if value is not None}


def untouched(rig, flow, model=None, **changed):
    """Latents of a fresh Encode Flow and a fresh sampler of ours, on the U-Net's scale."""
    ours = {key: changed.pop(key) for key in ("start_percent", "guide_flow") if key in changed}
    encoded = rig.encode(flow, PROMPT, **{**defaults(rig, "S2DMEncodeFlow"), **ours})
    settings = {**defaults(rig, "S2DMSharedNoiseKSampler"), "seed": 3, **changed}
    latents = rig.sample(encoded, model, **settings)
    return latents * rig.loaded.config.vae.scaling_factor


def pipeline(rig, flow, sampling=None):
    made = FlowToVideoPipeline.from_single_file(rig.checkpoint)
    made.set_progress_bar_config(disable=True)
    field = FlowField(flow.displacement, flow.occlusion)
    return made(PROMPT, field, seed=3, sampling=sampling, output_type="latent").frames


@pytest.mark.parametrize("entries", RECOMMENDATIONS, ids=str)
def test_untouched_widgets_agree_with_the_pipelines_defaults(recommending, entries):
    rig = recommending(**entries)
    flow = rig.flow(2)
    expected = pipeline(rig, flow)
    assert relative(untouched(rig, flow), expected) <= TOLERANCE
    # Not because nothing depends on the settings.
    other = pipeline(
        rig, flow, {"guidance_scale": 9.0, "flow_guidance_scale": 9.0, "flow_start": 0.0}
    )
    assert relative(other, expected) > 10 * TOLERANCE


def test_what_is_typed_in_counts_and_the_rest_stays_recommended(recommending):
    rig = recommending(**RECOMMENDATIONS[1])
    flow = rig.flow(2)
    assert (
        relative(
            untouched(rig, flow, steps=8, cfg=4.0),
            pipeline(rig, flow, {"steps": 8, "guidance_scale": 4.0}),
        )
        <= TOLERANCE
    )
    typed = untouched(rig, flow, start_percent=0.0, guide_flow="on")
    expected = pipeline(rig, flow, {"flow_start": 0.0, "flow_guidance_scale": 1.75})
    assert relative(typed, expected) <= TOLERANCE


def test_cores_sampler_starts_and_guides_the_flow_likewise(recommending):
    import nodes as core

    rig = recommending(**RECOMMENDATIONS[3])
    flow = rig.flow(1)
    positive, negative, latent = rig.encode(flow, PROMPT, **defaults(rig, "S2DMEncodeFlow"))
    with torch.inference_mode():
        (out,) = core.KSampler().sample(
            rig.loaded.model, 3, 4, 2.0, "ddim", "ddim_uniform", positive, negative, latent
        )
    ours = untouched(rig, flow) / rig.loaded.config.vae.scaling_factor
    assert relative(out["samples"], ours) < 1e-5


def test_the_recommendation_survives_other_nodes_and_comes_with_an_adapter(recommending):
    rig = recommending(**RECOMMENDATIONS[1])
    module = rig.module("nodes.native.recommended")
    expected = rig.loaded.config.sampling
    model = rig.loaded.model
    assert module.recommended(model) == expected
    assert module.recommended(model.clone().clone()) == expected
    plain = rig.plain_model()
    paper = module.recommended(plain)
    assert (paper.steps, paper.guidance_scale) == (20, 7.5)
    loaders = rig.module("nodes.loaders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "find_file", lambda name: str(rig.checkpoint))
        (patched,) = rig.run("S2DMApplyFlowAdapter", model=plain, adapter="any")
    assert module.recommended(patched) == expected
    # The model that the adapter was put on is as it was.
    assert module.recommended(plain) == paper
    flow = rig.flow(2)
    assert relative(untouched(rig, flow, patched), pipeline(rig, flow)) <= TOLERANCE


def test_an_end_before_the_recommended_start_is_refused(recommending):
    rig = recommending(**RECOMMENDATIONS[1])
    encoded = rig.encode(rig.flow(2), end_percent=0.1)
    with pytest.raises(ValueError, match=r"end_percent of at least 0\.15.*got 0\.1"):
        rig.sample(encoded)


def test_a_guider_of_two_scales_is_told_what_it_cannot_do(recommending):
    rig = recommending(**RECOMMENDATIONS[2])
    module = rig.module("nodes.native.recommended")
    positive, negative, _ = rig.encode(rig.flow(2))
    entries = {
        "positive": [dict(positive[0][1])],
        "middle": [dict(positive[0][1])],
        "negative": [dict(negative[0][1])],
    }
    with pytest.raises(ValueError, match="guide flow by 2, apart from the prompt"):
        module.resolve_labels(entries, rig.loaded.config.sampling, 1.0)


def test_a_flow_is_encoded_once_for_both_prompts(recommending, monkeypatch):
    rig = recommending(**RECOMMENDATIONS[2])
    kind = rig.module("s2dm.models").FlowAdapter
    calls = []
    tokens = kind.tokens
    monkeypatch.setattr(kind, "tokens", lambda *args: calls.append(1) or tokens(*args))
    untouched(rig, rig.flow(2))
    assert len(calls) == 1


def test_the_samplers_progress_counts_the_recommended_steps(recommending, monkeypatch):
    import latent_preview

    rig = recommending(**RECOMMENDATIONS[1])
    seen = []
    prepare = latent_preview.prepare_callback
    monkeypatch.setattr(
        latent_preview,
        "prepare_callback",
        lambda model, steps, *rest: seen.append(steps) or prepare(model, steps, *rest),
    )
    untouched(rig, rig.flow(1))
    assert seen == [5]
