"""Noise shared by the frames of a clip: the initial noise, and the noise of every step.

Frames of S2DM start at one point and fan out (paper, section 3.2). A sampler that draws fresh
noise for each frame at each step pulls them apart again; "fixed" seeds don't help, because they
fix the initial noise alone. Here one draw serves all frames, in each step of any sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler
from comfy.samplers import KSAMPLER, Sampler
from torch import Tensor

from ...s2dm.sector import SHARED, NoiseSharing, StepNoise, next_seed
from ...s2dm.sector.noise import BrownianPath
from .compat import takes
from .labels import LABEL
from .wrappers import held_adapter

log = logging.getLogger(__name__)

_BROWNIAN = {f"sample_dpmpp_{name}" for name in ("sde", "2m_sde", "2m_sde_heun", "3m_sde")}
"""Core's samplers that ask for noise of overlapping intervals. "_gpu" ones draw on the GPU."""


class SharedNoise:
    """NOISE whose frames agree as far as the sharing says.

    The noise of N frames in shared mode is the noise of one frame with the same seed and size.
    Core's RandomNoise gives that frame too, so a still and its clip can start alike.
    """

    def __init__(self, seed: int, sharing: NoiseSharing = SHARED) -> None:
        self.seed = seed
        self.sharing = sharing

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """Noise for a LATENT, (N, C, h, w) on the CPU.

        Latents that were picked from a longer clip (`batch_index`) get the noise that they had
        in it.
        """
        latent = input_latent["samples"]
        frames = input_latent.get("batch_index") or list(range(latent.shape[0]))
        # As core's noise does: samplers that draw on their own start from here.
        generator = torch.manual_seed(self.seed)
        noise = self.sharing.draw(max(frames) + 1, tuple(latent.shape[1:]), generator)
        return noise[frames].to(latent.dtype)


class SharedNoiseSampler(KSAMPLER):
    """A SAMPLER that shares the step noise of another one.

    A sampler function that takes a `noise_sampler` is given one that shares. Functions that
    draw nothing run as they are. What is left draws noise on its own (stochastic "churn", and
    samplers of other packs): there the draws themselves are answered, see `StepNoise`.
    """

    def __init__(self, inner: Sampler, sharing: NoiseSharing = SHARED) -> None:
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
        _warn_of_ignored_flow(model_wrap)
        rest = (noise, latent_image, denoise_mask, disable_pbar)
        inner = self.inner
        if self.sharing.mode == "independent":
            return inner.sample(model_wrap, sigmas, extra_args, callback, *rest)
        seed = next_seed(extra_args.get("seed") or 0)
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
        with StepNoise(noise.shape[0], generator, self.sharing):
            return inner.sample(model_wrap, sigmas, extra_args, callback, *rest)

    def _noise_sampler(self, noise: Tensor, sigmas: Tensor, seed: int) -> BrownianPath:
        positive = sigmas[sigmas > 0]
        name = getattr(self.sampler_function, "__name__", "")
        if name.removesuffix("_gpu") not in _BROWNIAN or len(positive) == 0:
            generator = torch.Generator().manual_seed(seed)

            def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
                drawn = self.sharing.draw(len(noise), tuple(noise.shape[1:]), generator)
                return drawn.to(noise).contiguous()

            return draw

        def path(like: Tensor, seed: int) -> BrownianPath:
            cpu = not name.endswith("_gpu")
            return BrownianTreeNoiseSampler(
                like, positive.min(), positive.max(), seed=seed, cpu=cpu
            )

        return self.sharing.brownian(path, noise, seed)


def _warn_of_ignored_flow(guider: Any) -> None:
    labels = [entry.get(LABEL) for entries in guider.conds.values() for entry in entries]
    if any(labels) and held_adapter(guider.model_patcher) is None:
        log.warning(
            "S2DM: the MODEL has no flow adapter, so it ignores the flow of Encode Flow (S2DM). "
            "Add Apply Flow Adapter (S2DM)."
        )


def takes_noise_sampler(function: Callable[..., Any]) -> bool:
    """Whether a sampler function lets its step noise come from outside."""
    # Core's dpm_adaptive hands all its options on, so its signature doesn't name this one.
    if getattr(function, "__name__", "") == "dpm_adaptive_function":
        return True
    return takes(function, "noise_sampler")


def draws_on_its_own(function: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether a sampler may draw noise past the `noise_sampler` in its options.

    One that takes a noise sampler is believed to draw from it alone. Of core's others those with
    "churn" draw; of other packs' others nothing is known.
    """
    if "noise_sampler" in options:
        return False
    return not function.__module__.startswith("comfy.") or options.get("s_churn", 0.0) > 0
