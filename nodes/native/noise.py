"""Noise shared by the frames of a clip: the initial noise, and the noise of every step.

Frames of S2DM start at one point and fan out (paper, section 3.2). A sampler that draws fresh
noise for each frame at each step pulls them apart again; "fixed" seeds don't help, because they
fix the initial noise alone. Here one draw serves all frames, in each step of any sampler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler
from comfy.samplers import KSAMPLER, Sampler
from torch import Tensor

from ...s2dm.sector import StepNoise, draw_noise
from ...s2dm.sector.noise import check_sharing

_SEEDS = 2**64
_INDEPENDENT = "independent"
_OWN_SEED = 0x5ED
"""What separates the seed of the frames' own noise from that of the common one in "mixed"."""


class SharedNoise:
    """NOISE whose frames agree; `draw_noise` explains the sharing and the share.

    The noise of N frames in shared mode is the noise of one frame with the same seed and size.
    Core's RandomNoise gives that frame too, so a still and its clip can start alike.
    """

    def __init__(self, seed: int, sharing: str = "shared", share: float = 0.5) -> None:
        check_sharing(sharing, share)
        self.seed = seed
        self.sharing = sharing
        self.share = share

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """Noise for a LATENT, (N, C, h, w) on the CPU.

        Latents that were picked from a longer clip (`batch_index`) get the noise that they had
        in it.
        """
        latent = input_latent["samples"]
        frames = input_latent.get("batch_index") or list(range(latent.shape[0]))
        # As core's noise does: samplers that draw on their own start from here.
        generator = torch.manual_seed(self.seed)
        noise = draw_noise(
            max(frames) + 1, tuple(latent.shape[1:]), generator, self.sharing, self.share
        )
        return noise[frames].to(latent.dtype)


class SharedNoiseSampler(KSAMPLER):
    """A SAMPLER that shares the step noise of another one.

    A sampler function that takes a `noise_sampler` is given one that shares. Functions that
    draw nothing run as they are. What is left draws noise on its own (stochastic "churn", and
    samplers of other packs): there the draws themselves are answered, see `StepNoise`.
    """

    def __init__(self, inner: Sampler, sharing: str = "shared", share: float = 0.5) -> None:
        check_sharing(sharing, share)
        if isinstance(inner, SharedNoiseSampler):
            inner = inner.inner
        # Other nodes look at these of any KSAMPLER.
        super().__init__(
            getattr(inner, "sampler_function", None),
            getattr(inner, "extra_options", {}),
            getattr(inner, "inpaint_options", {}),
        )
        self.inner = inner
        self.sharing = sharing
        self.share = share

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Run the sampler. Arguments and result are those of core's KSAMPLER."""
        rest = (noise, latent_image, denoise_mask, disable_pbar)
        inner = self.inner
        if self.sharing == _INDEPENDENT:
            return inner.sample(model_wrap, sigmas, extra_args, callback, *rest)
        # One more than the seed, because the initial noise was drawn with the seed itself.
        seed = ((extra_args.get("seed") or 0) + 1) % _SEEDS
        if isinstance(inner, KSAMPLER):
            options = dict(inner.extra_options)
            if takes_noise_sampler(inner.sampler_function):
                options["noise_sampler"] = self._noise_sampler(noise, sigmas, seed)
            # "random" draws own noise for masked regions, for each frame; the initial noise,
            # which is what other samplers use there, is shared already.
            inpaint = {**inner.inpaint_options, "random": False}
            draws = draws_on_its_own(inner.sampler_function, options)
            inner = KSAMPLER(inner.sampler_function, options, inpaint)
        else:
            draws = True
        if not draws:
            return inner.sample(model_wrap, sigmas, extra_args, callback, *rest)
        generator = torch.Generator().manual_seed(seed)
        with StepNoise(noise.shape[0], generator, self.sharing, self.share):
            return inner.sample(model_wrap, sigmas, extra_args, callback, *rest)

    def _noise_sampler(self, noise: Tensor, sigmas: Tensor, seed: int) -> Callable[..., Tensor]:
        positive = sigmas[sigmas > 0]
        if not is_sde(self.sampler_function) or len(positive) == 0:
            generator = torch.Generator().manual_seed(seed)
            return lambda sigma, sigma_next: (
                draw_noise(
                    noise.shape[0], tuple(noise.shape[1:]), generator, self.sharing, self.share
                )
                .to(noise)
                .contiguous()
            )
        span = (noise, positive.min(), positive.max())
        cpu = not self.sampler_function.__name__.endswith("_gpu")
        common = _tree(noise[:1], *span[1:], seed, cpu)
        own = None
        if self.sharing == "mixed":
            own = _tree(noise, *span[1:], (seed + _OWN_SEED) % _SEEDS, cpu)

        def shared_tree(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            one = common(sigma, sigma_next)
            if own is None:
                return one.expand_as(noise).contiguous()
            return self.share**0.5 * one + (1 - self.share) ** 0.5 * own(sigma, sigma_next)

        return shared_tree


def _tree(like: Tensor, low: Tensor, high: Tensor, seed: int, cpu: bool) -> Callable[..., Tensor]:
    return BrownianTreeNoiseSampler(like, low, high, seed=seed, cpu=cpu)


def takes_noise_sampler(function: Callable[..., Any]) -> bool:
    """Whether a sampler function lets its step noise come from outside."""
    # Core's dpm_adaptive hands all its options on, so its signature doesn't name this one.
    if getattr(function, "__name__", "") == "dpm_adaptive_function":
        return True
    return "noise_sampler" in inspect.signature(function).parameters


def is_sde(function: Callable[..., Any]) -> bool:
    """Whether a sampler asks for noise of intervals that overlap, which takes a Brownian tree."""
    name = getattr(function, "__name__", "")
    return name.startswith("sample_dpmpp") and "sde" in name


def draws_on_its_own(function: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether a sampler may draw noise past the `noise_sampler` in its options.

    Core's functions are known by their code. Others are believed when they take a noise
    sampler; without one, nothing is known of them.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not function.__module__.startswith("comfy."):
        return "noise_sampler" not in options
    if not {"randn", "randn_like"} & set(code.co_names):
        return False
    churns = "s_churn" in inspect.signature(function).parameters
    return not churns or options.get("s_churn", 0.0) > 0
