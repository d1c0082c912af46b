"""FVD and KVD of an evaluation: what they compare, and when weights can be given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_evaluation import DATA, count_made, tiny_evaluation

from s2dm.evaluation import run
from s2dm.evaluation.distances import frechet_distance, kvd
from s2dm.evaluation.i3d import VideoFeatures
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.run import EvaluationConfig, evaluate

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")


@pytest.fixture
def config(checkpoint, tmp_path) -> EvaluationConfig:
    return tiny_evaluation(checkpoint, tmp_path / "out")


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, str]]:
    return count_made(monkeypatch)


@pytest.fixture
def network(monkeypatch) -> list[int]:
    """A stand-in for I3D: mean and spread of each channel over quarters of the picture."""
    calls = []

    def features(video: torch.Tensor) -> torch.Tensor:
        calls.append(len(video))
        quarters = torch.nn.functional.adaptive_avg_pool3d(video, (1, 2, 2)).flatten(1)
        return torch.cat([quarters, video.std((2, 3, 4))], dim=1)

    def load(path, device):
        return VideoFeatures(features, f"stand-in {path}", "none")

    monkeypatch.setattr(run, "load_i3d", load)
    return calls


@pytest.fixture
def with_features(config) -> EvaluationConfig:
    data = dataclasses.replace(DATA, frames=9)
    variants = (Variant("given-flow"), Variant("autoencoder"))
    return dataclasses.replace(config, data=data, clips=3, variants=variants, i3d=Path("a"))


def test_fvd_and_kvd_compare_with_the_true_clips(with_features, network):
    config = with_features
    result = evaluate(config)
    assert sum(network) == 9  # two rows and the true clips, which are no row themselves
    table = result["table"]
    assert set(table) == {"given-flow", "autoencoder"}

    def features(mode: str) -> torch.Tensor:
        paths = sorted((config.output / "clips").glob(f"{mode}-*/*.npy"))
        return torch.from_numpy(np.stack([np.load(p) for p in paths]))

    for mode in table:
        real, generated = features("true"), features(mode)
        assert table[mode]["fvd"] == pytest.approx(frechet_distance(real, generated))
        assert table[mode]["kvd"] == pytest.approx(kvd(real, generated))
        assert table[mode]["fvd_95"][0] <= table[mode]["fvd"] <= table[mode]["fvd_95"][1]
    page = (config.output / "results.md").read_text("utf-8")
    assert "- features: stand-in a; none" in page
    assert "FVD of 3 clips" in page and page.count("FVD of 3 clips") == 1
    assert "| FVD (95 %) | KVD (95 %) |" in page

    # Another network means other features, of the same clips; the same network none.
    evaluate(config)
    assert sum(network) == 9
    evaluate(dataclasses.replace(config, i3d=Path("b")))
    assert sum(network) == 18


def test_weights_can_be_given_later(with_features, network, made):
    without = dataclasses.replace(with_features, i3d=None)
    assert "fvd" not in evaluate(without)["table"]["given-flow"]
    made.clear()
    assert "fvd" in evaluate(with_features)["table"]["given-flow"]
    assert {row for row, _ in made} == {"true"}  # the others were there


def test_distances_are_means_over_the_seeds(with_features, network):
    """So that they compare equally many clips; the features of all are kept."""
    config = dataclasses.replace(with_features, seeds=(0, 1))
    table = evaluate(config)["table"]
    with np.load(config.output / "features.npz") as stored:
        features = {name: torch.from_numpy(stored[name]) for name in stored.files}
    assert {name: tuple(rows.shape[:2]) for name, rows in features.items()} == {
        "given-flow": (3, 2),
        "autoencoder": (3, 1),
        "true": (3, 1),
    }
    row, real = table["given-flow"], features["true"][:, 0]
    for seed in (0, 1):
        alone = features["given-flow"][:, seed]
        assert row["fvd_seeds"][seed] == pytest.approx(frechet_distance(real, alone))
        assert row["kvd_seeds"][seed] == pytest.approx(kvd(real, alone))
    for name in ("fvd", "kvd"):
        assert row[name] == pytest.approx(sum(row[f"{name}_seeds"]) / 2)
        assert f"{name}_seeds" not in table["autoencoder"]
