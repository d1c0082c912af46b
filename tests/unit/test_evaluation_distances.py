"""FVD and KVD against SciPy and scikit-learn, and against what they must be by definition."""

import warnings

import numpy as np
import pytest
import torch
from degrade import DEGRADATIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.data.puppets import PuppetClips
from s2dm.evaluation.distances import (
    bootstrap,
    bootstrap_interval,
    frechet_distance,
    fvd,
    interval,
    kvd,
)


def features(count: int, size: int, seed: int) -> torch.Tensor:
    """Correlated features, as a network's are: their covariance is far from a multiple of 1."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mix + mix[0]


def by_scipy(x: torch.Tensor, y: torch.Tensor, correction: int) -> float:
    from scipy.linalg import sqrtm

    x, y = x.double().numpy(), y.double().numpy()
    first, second = (np.cov(f, rowvar=False, ddof=correction) for f in (x, y))
    root = sqrtm(first @ second).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)


# More clips than features, fewer, and one set of each.
SIZES = [(500, 450, 400), (60, 80, 40), (30, 20, 40), (90, 15, 40)]


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("n, m, size", SIZES)
def test_frechet_distance_is_that_of_scipy(n, m, size, correction):
    x, y = features(n, size, 0), features(m, size, 1)
    expected = by_scipy(x, y, correction)
    assert frechet_distance(x, y, correction) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(y, x, correction) == pytest.approx(expected, rel=1e-4)


def test_the_two_covariances_differ():
    x, y = features(10, 5, 0), features(12, 5, 1)
    assert frechet_distance(x, y, 0) != pytest.approx(frechet_distance(x, y, 1), rel=1e-3)


@pytest.mark.parametrize("n, m, size", SIZES)
def test_kernel_distance_is_that_of_scikit_learn(n, m, size):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = (f.double().numpy() for f in (features(n, size, 0), features(m, size, 1)))
    own = [pairwise.polynomial_kernel(f) for f in (x, y)]  # its defaults are the kernel of KVD
    expected = -2 * pairwise.polynomial_kernel(x, y).mean()
    for kernel in own:
        np.fill_diagonal(kernel, 0)
        expected += kernel.sum() / (len(kernel) * (len(kernel) - 1))
    assert kvd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-4)


def test_of_one_set_with_itself_nothing_is_left():
    for n, _, size in SIZES:
        x = 10 * features(n, size, 2)
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-3)
        assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.floats(-5, 5))
def test_a_shift_adds_its_square(n, m, size, shift):
    x, y = features(n, size, n), features(m, size, m + 50)
    y = y - y.mean(0) + x.mean(0)
    moved = frechet_distance(x, y + shift) - frechet_distance(x, y)
    assert moved == pytest.approx(size * shift**2, abs=1e-3, rel=1e-4)


def test_kernel_distance_has_no_bias():
    """Over many pairs of small sets from one distribution its mean is zero, from two it isn't."""
    source = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(8, 10, generator=source)  # noqa: E731
    same = torch.tensor([kvd(draw(), draw()) for _ in range(2000)])
    other = torch.tensor([kvd(draw(), draw() * 1.5 + 0.5) for _ in range(200)])
    error = same.std() / len(same) ** 0.5
    assert same.mean().abs() < 4 * error
    assert other.mean() > 20 * error


def test_few_clips_are_warned_of_in_plain_words():
    x, y = features(20, 40, 0), features(60, 40, 1)
    with pytest.warns(UserWarning, match=r"FVD of 20 clips.*more than 40"):
        fvd(x, y)
    many = features(2048, 40, 2)
    for few in (y, features(2047, 40, 3)):
        message = f"FVD of {len(few)} clips, where papers use 2048: it is biased upwards"
        with pytest.warns(UserWarning, match=message):
            fvd(few, many)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fvd(many, many)


def test_features_that_cannot_be_compared_are_refused():
    x = features(5, 4, 0)
    for y, message in (
        (features(5, 3, 0), "4 and of 3"),
        (x[:1], "at least 2 clips"),
        (x[0], "at least 2 clips"),
        (torch.where(x > 0, x, torch.nan), "NaN"),
    ):
        for distance in (frechet_distance, kvd):
            with pytest.raises(ValueError, match=message):
                distance(x, y)
    with pytest.raises(ValueError, match="correction"):
        frechet_distance(x, x, 2)


# -------------------------------------------------------------------------------- bootstrap


def test_bootstrap_covers_a_mean_as_often_as_it_says():
    """Of 200 sets of 30 normal numbers, some 95 % have the true mean in their interval."""
    source = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(
            lambda s: s.mean().item(), torch.from_numpy(source.normal(3, 1, 30)), seed=trial
        )
        inside += low <= 3 <= high
    assert 178 <= inside <= 198


def test_bootstrap_interval_lies_around_the_figure_and_repeats():
    x, y = features(30, 8, 0), features(25, 8, 1)
    figure = frechet_distance(x, y)
    low, high = bootstrap_interval(frechet_distance, x, y, samples=100)
    assert low < figure < high
    assert (low, high) == bootstrap_interval(frechet_distance, x, y, samples=100)
    assert (low, high) != bootstrap_interval(frechet_distance, x, y, samples=100, seed=1)
    inner = bootstrap_interval(frechet_distance, x, y, samples=100, level=0.5)
    assert low < inner[0] < inner[1] < high
    # Sequences are drawn from as well.
    assert bootstrap_interval(lambda words: len(set(words)), ["a"] * 4) == (1, 1)


def test_pairs_share_what_is_hard_about_a_clip():
    """The ratio of two means, 1 to 2, whose entries rise and fall together."""
    source = np.random.default_rng(1)
    inside, widths = 0, {True: 0.0, False: 0.0}
    for trial in range(100):
        clip = source.normal(0, 1, 40)
        a, b = (torch.from_numpy(mean * (4 + clip) + source.normal(0, 0.2, 40)) for mean in (1, 2))
        for paired in widths:
            means = bootstrap(
                lambda x, y: [x.mean().item(), y.mean().item()],
                *(a, b), samples=100, seed=trial, paired=paired,
            )  # fmt: skip
            assert means.shape == (100, 2)
            low, high = interval(means[:, 0] / means[:, 1])
            widths[paired] += high - low
            inside += paired and low <= 0.5 <= high
    assert 85 <= inside <= 100
    assert widths[True] < 0.5 * widths[False]


def test_clips_of_a_group_are_drawn_together():
    """Of 100 sets of 10 groups with 8 equal numbers each, as often as it says: else half of them.

    The mean of a set varies with its groups alone.
    """
    source = np.random.default_rng(2)
    inside = {True: 0, False: 0}
    groups = [clip % 10 for clip in range(80)]
    for trial in range(100):
        clips = torch.from_numpy(np.tile(source.normal(3, 1, 10), 8))
        for grouped in inside:
            low, high = bootstrap_interval(
                lambda s: s.mean().item(), clips, seed=trial, groups=groups if grouped else None
            )
            inside[grouped] += low <= 3 <= high
    assert inside[True] >= 82 and inside[False] <= 60

    # Pairs stay pairs, and every clip of a group that was drawn is there.
    def statistic(a: torch.Tensor, b: list[int]) -> float:
        assert a.tolist() == b and all(b.count(clip) == b.count(clip % 10) for clip in b)
        return 0.0

    bootstrap(statistic, torch.arange(80), list(range(80)), paired=True, groups=groups, samples=9)
    with pytest.raises(ValueError, match="group of each of 80 clips, got 3 groups"):
        bootstrap(lambda a: 0.0, list(range(80)), groups=[0, 0, 1])


def test_an_interval_of_pairs_draws_pairs():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(lambda a, b: (a - b).sum().item(), x, x, paired=True) == (0, 0)


def test_bootstrap_leaves_out_what_cannot_be_measured():
    def statistic(entries: list[float]) -> list[float]:
        return [sum(entries), float("nan") if entries[0] == 1 else 0.0]

    values = bootstrap(statistic, [0.0, 0.0, 1.0], samples=100)
    assert 40 < len(values) < 90
    with pytest.raises(ValueError, match="one entry a clip in each, got 2, 3 entries"):
        bootstrap(lambda a, b: 0.0, [1, 2], [1, 2, 3], paired=True)


# ------------------------------------------------------------------------------ what it sees


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    data = PuppetClips("test", size=64)
    return torch.stack([data[i * len(data) // 8].frames for i in range(8)])


def random_features(clips: torch.Tensor) -> torch.Tensor:
    """Means and spreads of two random layers of convolutions over space and time."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv3d(3, 32, (3, 5, 5), (1, 2, 2)),
            torch.nn.ReLU(),
            torch.nn.Conv3d(32, 64, (3, 5, 5), (1, 2, 2)),
            torch.nn.ReLU(),
        )
        maps = network(clips.transpose(1, 2) * 2 - 1)
    return torch.cat([maps.mean((2, 3, 4)), maps.std((2, 3, 4))], dim=1)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_distance_grows_with_what_is_done_to_the_clips(clips, name):
    degrade, levels = DEGRADATIONS[name]
    truth = random_features(clips)
    distances = [
        frechet_distance(truth, random_features(degrade(clips, level))) for level in levels
    ]
    assert distances[0] > 0
    assert distances == sorted(distances), distances
