"""FVD and KVD: how far two sets of clips lie apart in the features of a video network.

FVD: Unterthiner et al., "Towards Accurate Generative Models of Video" (2018). KVD: the kernel
distance beside it in the same paper, with the kernel that TATS and LVDM use.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PUBLISHED_CLIPS = 2048


def fvd(real: Tensor, generated: Tensor, correction: int = 1) -> float:
    """Frechet video distance between features (N,D) and (M,D).

    `frechet_distance`, with a warning where the sets are smaller than published ones.
    """
    distance = frechet_distance(real, generated, correction)
    problem = sample_size_problem(real, generated)
    if problem:
        warnings.warn(problem, stacklevel=2)
    return distance


def sample_size_problem(real: Tensor, generated: Tensor) -> str:
    """Why an FVD between features (N,D) and (M,D) means little; empty if there are enough."""
    size, needed = min(len(real), len(generated)), real.shape[1]
    if size >= PUBLISHED_CLIPS:
        return ""
    if size > needed:
        return (
            f"FVD of {size} clips, where papers use {PUBLISHED_CLIPS}: it is biased upwards, and "
            "ratios of two FVDs are pulled towards 1."
        )
    return (
        f"FVD of {size} clips: a covariance of {needed} features needs more than {needed} clips, "
        f"{size} leave most of it unknown. The figure is then largely the number of clips. Compare "
        "it only with figures from equally many clips, and with published ones not at all; those "
        f"use {PUBLISHED_CLIPS}."
    )


def frechet_distance(x: Tensor, y: Tensor, correction: int = 1) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of features.

    |μx − μy|² + Tr(Σx + Σy − 2 (Σx Σy)^½), in float64. With X and Y the centred features over
    √(N − correction), Σx = XᵀX and Σy = YᵀY, and the eigenvalues of Σx Σy are the squared singular
    values of X Yᵀ. So the trace of the root is the sum of those singular values: no matrix root is
    taken, and covariances without full rank (fewer clips than features) are no special case.

    Args:
        x, y: (N,D) and (M,D), N and M at least 2.
        correction: what the covariance divides by less than the number of clips: 1 for N − 1
            (TF-GAN, VideoGPT, TATS), 0 for N (StyleGAN-V).

    Raises:
        ValueError: features that are not two sets of vectors of one length, or not finite.
    """
    x, y = _checked(x, y)
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 (divide by N) or 1 (by N - 1), got {correction}.")
    apart = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((f - f.mean(0)) / (len(f) - correction) ** 0.5 for f in (x, y))
    traces = x.square().sum() + y.square().sum()
    # Many clips, few features: the triangular factors have the same products and are smaller.
    x, y = (torch.linalg.qr(f, mode="r").R if len(f) > f.shape[1] else f for f in (x, y))
    root = torch.linalg.svdvals(x @ y.T).sum()
    return (apart + traces - 2 * root).item()


def kvd(real: Tensor, generated: Tensor) -> float:
    """Kernel video distance between features (N,D) and (M,D): unbiased squared MMD, unscaled.

    Polynomial kernel (x·y/D + 1)³, in float64. Without bias even for few clips, so it can be below
    zero where the sets agree. That is said of independent sets: where clip k of one was made from
    clip k of the other, these N pairs are more alike than others, and lower the figure by a term
    in 1/N.

    Raises:
        ValueError: as `frechet_distance`.
    """
    x, y = _checked(real, generated)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)  # a clip with itself says nothing: the diagonal is left out
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def bootstrap(
    statistic: Callable[..., float | Sequence[float]],
    *sets: Tensor | Sequence[Any],
    samples: int = 200,
    seed: int = 0,
    paired: bool = False,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """What a figure would be with other clips of the same number.

    Each set is drawn anew from itself, with replacement, `samples` times. Sets that repeat clips
    lie further apart in FVD and KVD than the sets they were drawn from; that shift of the mean is
    taken off, so the values lie around the figure. They say nothing about the bias that FVD has
    for few clips.

    Args:
        statistic: called with one resampled set for each of `sets`; gives one figure or several.
            Samples in which one is NaN, because nothing in them can be measured, are left out.
        sets: tensors or sequences, one entry a clip.
        samples: how often to resample.
        seed: of the draws.
        paired: draw the same entries from every set, where entry k of each belongs to clip k. What
            the figures have in common then cancels in their ratio.
        groups: of each clip, where clips of one group are alike: whole groups are drawn.

    Returns:
        (samples,) or (samples, figures), float64.

    Raises:
        ValueError: paired sets of different sizes, or groups of another number of clips.
    """
    if paired and len({len(entries) for entries in sets}) > 1:
        sizes = ", ".join(str(len(entries)) for entries in sets)
        raise ValueError(f"Paired sets need one entry a clip in each, got {sizes} entries.")
    chance = random.Random(seed)

    def choose(entries: Tensor | Sequence[Any]) -> list[int]:
        blocks = _blocks(len(entries), groups)
        return [entry for block in chance.choices(blocks, k=len(blocks)) for entry in block]

    def draw() -> list[Tensor | list[Any]]:
        picks = [choose(sets[0])] * len(sets) if paired else [choose(entries) for entries in sets]
        return [
            entries[picked] if isinstance(entries, Tensor) else [entries[i] for i in picked]
            for entries, picked in zip(sets, picks, strict=True)
        ]

    figures = torch.tensor(statistic(*sets), dtype=torch.float64)
    values = torch.tensor([statistic(*draw()) for _ in range(samples)], dtype=torch.float64)
    values = values[~values.view(samples, -1).isnan().any(1)]
    return values + (figures - values.mean(0))


def _blocks(count: int, groups: Sequence[int] | None) -> list[list[int]]:
    """Entries that are drawn together: those of one group, or each by itself."""
    groups = range(count) if groups is None else groups
    if len(groups) != count:
        raise ValueError(f"Expected the group of each of {count} clips, got {len(groups)} groups.")
    blocks: dict[int, list[int]] = {}
    for entry, group in enumerate(groups):
        blocks.setdefault(group, []).append(entry)
    return list(blocks.values())


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Between which two numbers the share `level` of the values (samples,) lies."""
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = torch.quantile(values, edges).tolist()
    return low, high


def bootstrap_interval(
    statistic: Callable[..., float],
    *sets: Tensor | Sequence[Any],
    samples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    paired: bool = False,
    groups: Sequence[int] | None = None,
) -> tuple[float, float]:
    """How far one figure would move with other clips of the same number: see `bootstrap`.

    Args:
        statistic, sets, samples, seed, paired, groups: as of `bootstrap`.
        level: share of the samples that lie inside.
    """
    values = bootstrap(statistic, *sets, samples=samples, seed=seed, paired=paired, groups=groups)
    return interval(values, level)


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, features in (("first", x), ("second", y)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"Expected features of at least 2 clips, (N, D), in the {name} set, got "
                f"{tuple(features.shape)}."
            )
        if not torch.isfinite(features).all():
            raise ValueError(
                f"The features of the {name} set hold NaN or infinite values: look at its clips."
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Features of {x.shape[1]} and of {y.shape[1]} numbers can't be compared: take both "
            "from the same network."
        )
    return x.double(), y.double()
