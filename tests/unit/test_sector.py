"""The sector process: noise sharing, forward process, loss, guidance, sampling."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.sector import (
    NOISE_SHARING,
    SHARED,
    NoiseSharing,
    StepNoise,
    add_noise,
    alphas_cumprod,
    betas,
    guide,
    implied_prediction,
    next_seed,
    predicted_x0,
    sample,
    sector_loss,
    training_target,
)

SHAPE = (4, 6, 5)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(frames=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_shared_noise_is_the_noise_of_one_frame(frames, seed):
    one = SHARED.draw(1, SHAPE, seeded(seed))
    clip = SHARED.draw(frames, SHAPE, seeded(seed))
    assert clip.shape == (frames, *SHAPE)
    assert torch.equal(clip, one.expand(frames, *SHAPE))
    own = NoiseSharing("independent").draw(frames, SHAPE, seeded(seed))
    assert torch.equal(own[:1], one)


def test_mixed_noise_keeps_the_variance_and_the_share():
    share = 0.7
    noise = NoiseSharing("mixed", share).draw(2, (4, 128, 128), seeded())
    first, second = noise.flatten(1)
    assert noise.var().item() == pytest.approx(1.0, abs=0.02)
    assert torch.dot(first, second).item() / first.numel() == pytest.approx(share, abs=0.02)
    assert torch.equal(
        NoiseSharing("mixed", 1.0).draw(3, SHAPE, seeded()), SHARED.draw(3, SHAPE, seeded())
    )


def test_the_papers_sharing_is_the_usual_one():
    assert NoiseSharing() == SHARED == NoiseSharing("shared")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SHARED.draw(0, SHAPE), "at least 1 frame"),
        (lambda: NoiseSharing("same"), "expected one of shared, independent, mixed, got 'same'"),
        (lambda: NoiseSharing("mixed", 1.5), r"from 0 to 1, got 1\.5"),
        (lambda: NoiseSharing("mixed", -0.1), r"from 0 to 1, got -0\.1"),
        (lambda: NoiseSharing("mixed", float("nan")), "from 0 to 1, got nan"),
    ],
)
def test_noise_refuses_nonsense(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def tree(like, seed):
    """A Brownian path from σ 15 down to 0.1, whose increments come scaled to a variance of 1."""
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    return BrownianTreeNoiseSampler(like, 0.1, 15.0, seed)


@pytest.mark.parametrize("mode", NOISE_SHARING)
def test_increments_of_intervals_that_overlap_belong_together(mode):
    noise = NoiseSharing(mode, 0.3).brownian(tree, torch.zeros(3, *SHAPE), 5)

    def increment(start, end):
        return noise(torch.tensor(start), torch.tensor(end)) * (start - end) ** 0.5

    parts = increment(9.0, 4.0) + increment(4.0, 1.0)
    torch.testing.assert_close(parts, increment(9.0, 1.0), rtol=1e-4, atol=1e-4)
    assert (parts - increment(9.0, 4.0)).abs().max() > 0.1


def test_brownian_noise_is_shared_as_plain_noise_is():
    interval = torch.tensor(9.0), torch.tensor(4.0)
    clip, share = torch.zeros(3, *SHAPE), 0.3
    common = tree(clip[:1], 5)(*interval)
    own = tree(clip, next_seed(5))(*interval)
    expected = {
        "shared": common.expand_as(clip),
        "independent": tree(clip, 5)(*interval),
        "mixed": share**0.5 * common + (1 - share) ** 0.5 * own,
    }
    assert set(expected) == set(NOISE_SHARING)
    for mode, noise in expected.items():
        draw = NoiseSharing(mode, share).brownian(tree, clip, 5)
        for _ in range(2):
            drawn = draw(*interval)
            torch.testing.assert_close(drawn, noise, rtol=1e-5, atol=1e-6)
            drawn *= 2  # it may be written to, and the path stays
    whole = NoiseSharing("mixed", 1.0).brownian(tree, clip, 5)(*interval)
    assert torch.equal(whole, expected["shared"])


def test_mixed_brownian_noise_keeps_the_variance_and_the_share():
    share = 0.7
    draw = NoiseSharing("mixed", share).brownian(tree, torch.zeros(2, 4, 128, 128), 5)
    noise = draw(torch.tensor(9.0), torch.tensor(4.0))
    first, second = noise.flatten(1)
    assert noise.var().item() == pytest.approx(1.0, abs=0.02)
    assert torch.dot(first, second).item() / first.numel() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_the_next_seed_is_another_that_torch_takes(seed):
    assert next_seed(seed) != seed
    seeded(next_seed(seed))


def test_step_noise_answers_only_draws_over_the_clip():
    with StepNoise(3, seeded(), SHARED):
        like = torch.randn_like(torch.zeros(3, 4, 2, 2, dtype=torch.bfloat16))
        size = torch.randn(3, 4, 2, 2)
        other = torch.randn(5, 4, 2, 2)
    assert like.dtype == torch.bfloat16
    for noise in (like, size):
        assert torch.equal(noise, noise[:1].expand_as(noise))
        noise *= 2  # as torch's own, it may be written to
    assert not torch.equal(other[0], other[1])
    outside = torch.randn(3, 4, 2, 2)
    assert not torch.equal(outside[0], outside[1])


def test_alphas_cumprod_are_those_of_stable_diffusion():
    ours = alphas_cumprod()
    theirs = diffusers.DDPMScheduler(**SCHEDULE).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="sigmoid"):
        alphas_cumprod(beta_schedule="sigmoid")


def test_forward_process_agrees_with_diffusers():
    x0, noise = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    scheduler = diffusers.DDPMScheduler(**SCHEDULE)
    t = torch.tensor([0, 500, 999])
    ours = add_noise(x0, noise, alphas_cumprod()[t])
    torch.testing.assert_close(ours, scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    velocity = training_target(x0, noise, alphas_cumprod()[t], "v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, noise, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_the_true_answer_and_shares_the_noise(prediction_type):
    x0, noise = torch.randn(2, 5, *SHAPE), torch.randn(2, 1, *SHAPE)
    t, bars = torch.tensor([100, 800]), alphas_cumprod()
    seen = {}

    def oracle(x_t, timesteps):
        seen.update(x_t=x_t, timesteps=timesteps)
        return training_target(x0, noise, bars[t], prediction_type).flatten(0, 1)

    assert sector_loss(oracle, x0, noise, t, bars, prediction_type).item() == 0.0
    assert seen["timesteps"].tolist() == [100] * 5 + [800] * 5
    wrong = sector_loss(lambda x, _: torch.zeros_like(x), x0, noise, t, bars, prediction_type)
    assert wrong.item() > 0.1
    # One noise for the clip: frames differ after the forward process only as their x_0 do.
    spread = (seen["x_t"][0] - seen["x_t"][1]) / bars[100].sqrt()
    torch.testing.assert_close(spread, x0[0, 0] - x0[0, 1], rtol=1e-3, atol=1e-4)


def test_guidance_with_equal_scales_is_joint_guidance():
    null, flow, full = torch.randn(3, 2, *SHAPE)
    joint = guide(null, full, 7.5)
    torch.testing.assert_close(guide(null, full, 7.5, flow, 7.5), joint, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guide(null, full, 1.0), full, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="flow scale"):
        guide(null, full, 7.5, flow_scale=2.0)


SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE),
    "kdpm2_ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(**SCHEDULE),
    "dpmpp_2m_sde": lambda: diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="sde-dpmsolver++"
    ),
    "dpmpp_sde": lambda: diffusers.DPMSolverSDEScheduler(**SCHEDULE),
    "lcm": lambda: diffusers.LCMScheduler(**SCHEDULE),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**SCHEDULE),
}
STOCHASTIC = {"ddpm", "euler_ancestral", "kdpm2_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm"}


def toy_denoiser(latents, timestep):
    return 0.3 * latents.roll(1, dims=-1) + 0.1 * latents.tanh()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("sharing", NOISE_SHARING)
def test_equal_conditions_give_equal_frames_with_every_scheduler(name, sharing):
    noise = SHARED.draw(3, SHAPE, seeded())  # always shared, so that only step noise can differ
    clip = sample(toy_denoiser, SCHEDULERS[name](), noise, 6, seeded(1), NoiseSharing(sharing))
    spread = (clip - clip[:1]).abs().max() / clip.std()
    assert torch.isfinite(clip).all()
    if sharing == "shared" or name not in STOCHASTIC:
        assert spread < 1e-5
    else:
        assert spread > 1e-2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_clip_of_one_frame_is_frame_one_of_a_longer_clip(name):
    one = sample(toy_denoiser, SCHEDULERS[name](), SHARED.draw(1, SHAPE, seeded()), 6, seeded(1))
    clip = sample(toy_denoiser, SCHEDULERS[name](), SHARED.draw(4, SHAPE, seeded()), 6, seeded(1))
    torch.testing.assert_close(clip[:1], one, rtol=1e-4, atol=1e-5)


def test_sampling_starts_from_the_forward_process_and_can_be_stopped():
    scheduler = SCHEDULERS["ddim"]()
    noise = SHARED.draw(2, SHAPE, seeded())
    started = []

    def denoise(latents, timestep):
        started.append((latents, timestep))
        return latents

    def stop(number, latents):
        if number == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(denoise, scheduler, noise, 5, on_step=stop)
    first, timestep = started[0]
    assert len(started) == 2
    expected = (1 - scheduler.alphas_cumprod[timestep]).sqrt() * noise
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_prediction_and_the_clean_sample_imply_each_other(kind):
    x0, noise = torch.randn(3, 4, 2, 8, 8), torch.randn(3, 1, 2, 8, 8)
    alpha_bar = alphas_cumprod(beta_schedule="cosine")[torch.tensor([10, 500, 900])]
    x_t = add_noise(x0, noise, alpha_bar)
    target = training_target(x0, noise, alpha_bar, kind)
    torch.testing.assert_close(predicted_x0(target, x_t, alpha_bar, kind), x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        implied_prediction(x0, x_t, alpha_bar, kind), target, rtol=1e-3, atol=1e-4
    )


def test_the_cosine_schedule_is_the_published_one():
    """diffusers has the same schedule with another cap on beta."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.double()
    ours = betas(beta_schedule="cosine")
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-4, atol=1e-6)
    assert float(ours[-1]) == 0.9999


def test_a_scheduler_that_adds_no_noise_is_named():
    with pytest.raises(ValueError, match="got FlowMatchEulerDiscreteScheduler"):
        sample(
            toy_denoiser, diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(2, 4, 8, 8), 4
        )
