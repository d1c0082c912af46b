"""One noise for all frames: at the start, and at every step of every sampler."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.comfyui

FRAMES = 3


def spread(latents: torch.Tensor) -> float:
    """The largest difference between frames, in standard deviations of the latents."""
    return float((latents - latents[:1]).abs().max() / latents.std())


@pytest.fixture(scope="module")
def still(rig):
    """Conditioning of frames that are all the same."""
    return rig.encode(rig.equal_flow(FRAMES))


def core_samplers() -> list[str]:
    """The samplers of the ComfyUI under test, if there is one."""
    import os
    import re
    from pathlib import Path

    folder = os.environ.get("COMFYUI_PATH") or os.environ.get("S2DM_COMFYUI")
    if not folder:
        return ["ddim"]
    # Parametrising happens before fixtures, so the list is read, not imported.
    source = (Path(folder) / "comfy" / "samplers.py").read_text(encoding="utf-8")
    names = re.search(r"^KSAMPLER_NAMES = \[(.*?)\]", source, re.S | re.M).group(1)
    return [*re.findall(r'"(\w+)"', names), "ddim", "uni_pc", "uni_pc_bh2"]


@pytest.mark.parametrize("name", core_samplers())
def test_equal_conditions_give_equal_frames(rig, still, name):
    """For every sampler of core, to 1e-4 of the standard deviation."""
    latents = rig.sample(still, sampler_name=name, scheduler="normal", steps=4)
    assert torch.isfinite(latents).all()
    assert latents.std() > 0
    assert spread(latents) < 1e-4


def test_all_of_cores_samplers_are_tried(comfy):
    import comfy.samplers

    assert core_samplers() == list(comfy.samplers.KSampler.SAMPLERS)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "seeds_3"])
def test_cores_fixed_seed_is_not_enough(rig, still, name):
    """The control: with core's KSampler and LatentBatchSeedBehavior the frames differ."""
    # First, because newer versions import it and the next one from each other.
    import comfy_extras.nodes_post_processing  # noqa: F401
    from comfy_extras.nodes_latent import LatentBatchSeedBehavior

    import nodes

    positive, negative, latent = still
    fixed = LatentBatchSeedBehavior.execute(latent, "fixed").args[0]
    with torch.inference_mode():
        (out,) = nodes.KSampler().sample(
            rig.loaded.model, 7, 4, 4.0, name, "normal", positive, negative, fixed
        )
    assert spread(out["samples"]) > 0.1


def test_ddim_shares_under_a_noise_mask(rig, still):
    """Core draws own noise for masked regions in this sampler, for each frame."""
    positive, negative, latent = still
    masked = {**latent, "noise_mask": torch.zeros(1, 64, 64), "samples": latent["samples"] + 0.1}
    masked["noise_mask"][:, :, 32:] = 1.0
    assert spread(rig.sample((positive, negative, masked), steps=4)) < 1e-4


def test_independent_frames_differ(rig, still):
    assert spread(rig.sample(still, noise_sharing="independent")) > 0.1


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_share_of_one_is_shared(rig, still, name):
    latents = rig.sample(still, noise_sharing="mixed", share=1.0, sampler_name=name)
    assert spread(latents) < 1e-4
    assert spread(rig.sample(still, noise_sharing="mixed", share=0.5, sampler_name=name)) > 0.1


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_sde"])
def test_a_clip_starts_and_ends_as_its_still(rig, still, name):
    """N frames in shared mode are the one frame of the same seed, N times."""
    clip = rig.sample(still, sampler_name=name, scheduler="normal", steps=3)
    one = rig.sample(rig.encode(rig.equal_flow(1)), sampler_name=name, scheduler="normal", steps=3)
    assert torch.allclose(clip[:1], one, atol=1e-4 * float(one.std()))


def test_shared_noise_is_cores_noise_of_one_frame(rig):
    import comfy.sample

    (noise,) = rig.run("S2DMSharedNoise", seed=11)
    drawn = noise.generate_noise({"samples": torch.zeros(5, 4, 6, 7)})
    assert drawn.shape == (5, 4, 6, 7)
    assert noise.seed == 11
    assert torch.equal(drawn[:1], comfy.sample.prepare_noise(torch.zeros(1, 4, 6, 7), 11))
    assert all(torch.equal(frame, drawn[0]) for frame in drawn)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise_sharing": "some"}, "one of shared, independent, mixed, got 'some'"),
        ({"noise_sharing": "mixed", "share": 1.5}, r"from 0 to 1, got 1\.5"),
    ],
)
def test_a_sharing_that_does_not_exist_is_refused_by_the_node(rig, still, wrong, message):
    import comfy.samplers

    with pytest.raises(ValueError, match=rf"^KSampler with Shared Noise \(S2DM\): .*{message}"):
        rig.sample(still, **wrong)
    with pytest.raises(ValueError, match=rf"^Shared Noise \(S2DM\): .*{message}"):
        rig.run("S2DMSharedNoise", seed=1, **wrong)
    sampler = comfy.samplers.sampler_object("ddim")
    with pytest.raises(ValueError, match=rf"^Shared-Noise Sampler \(S2DM\): .*{message}"):
        rig.run("S2DMSharedNoiseSampler", sampler=sampler, **wrong)


def test_samplers_that_draw_on_their_own_repeat_themselves(rig):
    """Samplers of other packs draw from PyTorch's own generator, which core's noise seeds."""
    latent = {"samples": torch.zeros(2, 4, 4, 4)}
    (noise,) = rig.run("S2DMSharedNoise", seed=5, noise_sharing="independent")
    drawn = []
    for _ in range(2):
        noise.generate_noise(latent)
        drawn.append(torch.randn(3))
    assert torch.equal(*drawn)


def test_frames_picked_from_a_clip_keep_their_noise(rig):
    for sharing in ("independent", "mixed"):
        (noise,) = rig.run("S2DMSharedNoise", seed=3, noise_sharing=sharing)
        for side in (8, 15):  # 4 * 15 * 15 numbers are no whole blocks of those torch fills
            latents = torch.zeros(6, 4, side, side)
            clip = noise.generate_noise({"samples": latents})
            picked = noise.generate_noise({"samples": latents[:2], "batch_index": [4, 1]})
            assert torch.equal(picked, clip[[4, 1]])


def test_denoise_keeps_some_of_the_latents_that_come_in(rig, still):
    positive, negative, latent = still
    start = torch.randn(1, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(2))
    given = {"samples": start.expand_as(latent["samples"]).clone()}

    def away(denoise):
        clip = rig.sample((positive, negative, given), steps=8, denoise=denoise)
        assert spread(clip) < 1e-4
        return float((clip - given["samples"]).norm())

    assert away(0.2) < away(0.5) < away(1.0)


def sample_custom(rig, encoded, sampler, steps=4):
    """Through core's SamplerCustomAdvanced, with our NOISE."""
    import comfy.samplers

    positive, negative, latent = encoded
    guider = comfy.samplers.CFGGuider(rig.loaded.model)
    guider.set_conds(positive, negative)
    guider.set_cfg(4.0)
    sampling = rig.loaded.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    return rig.sample_guided(guider, sampler, sigmas, latent)


def own_sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As another pack may write it: noise past all that core offers."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        noise = torch.randn_like(x)
        noise *= sigmas[i + 1]  # it owns what it drew
        x = denoised + noise
    return x


def handed_sampler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None
):
    """Takes the noise that it is handed, and writes into it as its own."""
    drawn = torch.empty_like(x)
    draw = noise_sampler or (lambda *_: torch.randn_like(drawn))
    for i in range(len(sigmas) - 1):
        x = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        if sigmas[i + 1] > 0:
            noise = draw(sigmas[i], sigmas[i + 1])
            noise *= sigmas[i + 1]
            x = x + noise
    return x


def sample_dpmpp_sde_of_another_pack(
    model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None
):
    """The same with noise of intervals, as the name says."""
    return handed_sampler(model, x, sigmas, extra_args, callback, disable, noise_sampler)


def core_and_foreign_samplers():
    import comfy.samplers
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    return {
        "euler_ancestral": comfy.samplers.sampler_object("euler_ancestral"),
        "churned euler": comfy.samplers.ksampler("euler", {"s_churn": 2.0}),
        "stochastic dpm_adaptive": comfy.samplers.ksampler(
            "dpm_adaptive", {"eta": 1.0, "rtol": 2.0}
        ),
        "lcm upscale": SamplerLCMUpscale.execute(2.0, 2, "bilinear").args[0],
        "another pack's": comfy.samplers.KSAMPLER(own_sampler),
        "another pack's with noise from outside": comfy.samplers.KSAMPLER(handed_sampler),
        "another pack's SDE": comfy.samplers.KSAMPLER(sample_dpmpp_sde_of_another_pack),
    }


@pytest.mark.parametrize(
    "name",
    [
        "euler_ancestral",
        "churned euler",
        "stochastic dpm_adaptive",
        "lcm upscale",
        "another pack's",
        "another pack's with noise from outside",
        "another pack's SDE",
    ],
)
def test_any_sampler_can_share(rig, still, name):
    sampler = core_and_foreign_samplers()[name]
    assert spread(sample_custom(rig, still, sampler)) > 0.05, "the control doesn't differ"
    (shared,) = rig.run("S2DMSharedNoiseSampler", sampler=sampler)
    assert spread(sample_custom(rig, still, shared)) < 1e-4


def test_the_sampler_that_comes_in_stays_as_it_was(rig, still):
    import comfy.samplers

    sampler = comfy.samplers.sampler_object("ddim")
    before = dict(sampler.extra_options), dict(sampler.inpaint_options)
    (shared,) = rig.run("S2DMSharedNoiseSampler", sampler=sampler)
    (twice,) = rig.run("S2DMSharedNoiseSampler", sampler=shared, noise_sharing="mixed")
    sample_custom(rig, still, twice)
    assert (sampler.extra_options, sampler.inpaint_options) == before
    assert twice.inner is sampler and twice.sharing.mode == "mixed"


def test_the_nodes_agree(rig, still):
    """KSampler with Shared Noise is SharedNoise and SharedNoiseSampler put together."""
    import comfy.samplers

    (shared,) = rig.run(
        "S2DMSharedNoiseSampler", sampler=comfy.samplers.sampler_object("euler_ancestral")
    )
    one = sample_custom(rig, still, shared)
    other = rig.sample(still, seed=5, steps=4, sampler_name="euler_ancestral", scheduler="normal")
    assert torch.equal(one, other)


def test_step_noise_is_not_the_initial_noise_again(rig):
    import comfy.samplers

    native = rig.module("nodes.native.noise")
    seen = []

    def peek(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        seen.append(noise_sampler(sigmas[0], sigmas[1]))
        return x

    sampler = native.SharedNoiseSampler(comfy.samplers.KSAMPLER(peek))
    sample_custom(rig, rig.encode(rig.equal_flow(FRAMES)), sampler)
    (noise,) = rig.run("S2DMSharedNoise", seed=5)
    initial = noise.generate_noise({"samples": torch.zeros(FRAMES, 4, 8, 8)})
    assert abs(float((seen[0] * initial).mean())) < 0.25
