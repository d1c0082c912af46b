"""Many videos of few clips, as papers generate them, and FVD against other ways to compute it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes

from s2dm import cli
from s2dm.data import DataConfig
from s2dm.evaluation import run
from s2dm.evaluation.distances import frechet_distance, kvd
from s2dm.evaluation.i3d import VideoFeatures
from s2dm.evaluation.modes import ClipSampler, Variant
from s2dm.evaluation.run import EvaluationConfig, draw_conditions, evaluate
from s2dm.evaluation.store import as_frames
from s2dm.evaluation.tables import by_label

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")


@pytest.fixture
def config(checkpoint, tmp_path, monkeypatch) -> EvaluationConfig:
    """Nine videos of six clips, with means over patches as features."""

    def features(video: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(video, (9, 8, 8)).flatten(1)[:, :12]

    monkeypatch.setattr(run, "load_i3d", lambda path, device: VideoFeatures(features, "mean", "no"))
    return EvaluationConfig(
        checkpoint=checkpoint,
        output=tmp_path / "out",
        data=DataConfig(size=32, frames=9),
        clips=6,
        videos=9,
        variants=(Variant("zero-flow"), Variant("autoencoder")),
        sampling={"steps": 1},
        method=None,
        i3d=Path("a"),
        sheet_clips=1,
        cpu=True,
    )


def test_conditions_are_drawn_with_repetition_and_always_alike():
    clips = list(range(84))
    drawn = draw_conditions(clips, 2048)
    assert sum(drawn.values()) == 2048 and list(drawn) == clips
    assert drawn == draw_conditions(clips, 2048)
    # As many as independent draws give: a mean of 24, and a deviation of the root of it.
    counts = np.array(list(drawn.values()))
    assert 3.5 < counts.std() < 6.5 and counts.min() > 8
    few = draw_conditions(clips, 10)
    assert all(few[clip] <= drawn[clip] for clip in clips)  # more videos add to those there are


def test_videos_of_all_clips_are_compared_at_once(config):
    result = evaluate(config)
    row, encoded = result["table"]["zero-flow"], result["table"]["autoencoder"]
    stored = np.load(config.output / "features.npz")
    generated, real = (torch.from_numpy(stored[name]) for name in ("zero-flow", "true"))
    assert generated.shape == (9, 12) and real.shape == (6, 12)
    assert row["videos"] == 9 and "videos" not in encoded
    assert row["fvd"] == pytest.approx(frechet_distance(real, generated))
    assert row["kvd"] == pytest.approx(kvd(real, generated))
    assert len(row["fvd_95"]) == 2
    # Each video from noise of its own: as many files as videos, all different.
    folder = config.output / result["clips"]["zero-flow"]
    frames = [np.load(path)["frames"].tobytes() for path in folder.glob("*.npz")]
    assert len(frames) == len(set(frames)) == 9
    drawn = draw_conditions(run.shuffled(65)[:6], 9)
    of_clips = Counter(int(path.stem.split("_")[0]) for path in folder.glob("*.npz"))
    assert of_clips == Counter({clip: count for clip, count in drawn.items() if count})
    assert row["clips"] == len(of_clips)
    places = Counter(stored["zero-flow/clip"].tolist())
    assert [places[place] for place in range(6)] == list(drawn.values())
    assert "9 generated in each row" in result["protocol"]["videos"]
    assert "seeds" not in result["protocol"]


def test_more_videos_add_to_those_there_are(config, monkeypatch):
    made = []
    make = Variant.make
    monkeypatch.setattr(
        Variant, "make", lambda self, *rest: (made.append(str(self)), make(self, *rest))[1]
    )
    config = dataclasses.replace(config, variants=(Variant("zero-flow"),))
    evaluate(config)
    assert made.count("zero-flow") == 9 and made.count("true") == 6
    made.clear()
    evaluate(dataclasses.replace(config, videos=12))
    assert made == ["zero-flow"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seeds": (1,)}, "videos or seeds"), ({"videos": 1}, "2 videos or more")],
)
def test_settings_that_do_not_fit(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.slow
def test_many_processes_make_the_same_videos(config, monkeypatch):
    config = dataclasses.replace(config, i3d=None, variants=(Variant("zero-flow"),))
    alone = evaluate(config)
    output = config.output.with_name("shared")
    command = ["-m", "s2dm.cli", "evaluate", "--checkpoint", config.checkpoint, "-o", output]
    command += ["--modes", "zero-flow", "--clips", 6, "--videos", 9, "--steps", 1]
    run_processes(3, *command, "--data", "size=32", "frames=9", "--cpu", "--method", "none")
    shared = json.loads((output / "results.json").read_text("utf-8"))
    assert shared["table"] == alone["table"] and shared["clips"] == alone["clips"]


@pytest.mark.slow
def test_2048_videos_of_84_conditions(checkpoint, tmp_path, monkeypatch):
    """The command as the paper's tables need it, all but the networks: its FVD is that of two other
    ways to compute it, from what it has stored."""
    linalg = pytest.importorskip("scipy.linalg")
    asked = Counter()

    def follow(self, prompt, flow, variant, seed, output_type="pt"):
        """A clip of its own for each seed, coloured by its conditions."""
        asked[prompt] += 1
        noise = torch.rand(len(flow), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return (0.5 * noise + 0.05 * flow.magnitude() + (len(prompt) % 7) / 30).clamp(0, 1)

    def features(video: torch.Tensor) -> torch.Tensor:
        return 20 * torch.nn.functional.avg_pool3d(video, (9, 4, 4)).flatten(1)

    monkeypatch.setattr(ClipSampler, "follow", follow)
    monkeypatch.setattr(run, "load_i3d", lambda path, device: VideoFeatures(features, "mean", "no"))
    output, weights = tmp_path / "out", tmp_path / "i3d"
    weights.touch()
    command = [
        "evaluate",
        "-o",
        str(output),
        "--checkpoint",
        str(checkpoint),
        "--i3d",
        str(weights),
    ]
    command += ["--modes", "given-flow", "--clips", "84", "--videos", "2048", "--method", "none"]
    command += ["--data", "size=16", "frames=9", "takes=2", "--sheet-clips", "1", "--cpu"]
    assert cli.main(command) in (0, None)
    result = json.loads((output / "results.json").read_text("utf-8"))
    row = result["table"]["given-flow"]
    assert row["videos"] == 2048 == sum(asked.values())
    assert row["clips"] == 84

    drawn = {clip: count for clip, count in draw_conditions(run.shuffled(130)[:84], 2048).items()}
    folder = output / result["clips"]["given-flow"]
    for clip, count in drawn.items():  # the r-th video of a clip is that of seed r
        names = sorted(int(path.stem.split("_")[1]) for path in folder.glob(f"{clip:05d}_*.npz"))
        assert names == list(range(count))
    stored = np.load(output / "features.npz")
    assert [*Counter(stored["given-flow/clip"].tolist()).values()] == list(drawn.values())
    x, y = (stored[name].astype(np.float64) for name in ("true", "given-flow"))
    assert x.shape == (84, 48) and y.shape == (2048, 48)
    again = [as_frames(np.load(path)["frames"]) for path in sorted(folder.glob("*.npz"))[:50]]
    of_files = features(torch.stack(again).transpose(1, 2)).numpy()
    assert all(np.abs(y - one).max(1).min() < 1e-5 for one in of_files)

    apart = np.square(x.mean(0) - y.mean(0)).sum()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(b)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ a @ root).clip(0)).sum()
    assert row["fvd"] == pytest.approx(apart + np.trace(a + b) - 2 * trace, rel=1e-6)
    by_scipy = apart + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert row["fvd"] == pytest.approx(by_scipy, rel=1e-6)


# ------------------------------------------------------------------- FVD by other ways to compute


def random_features(count: int, seed: int, size: int = 400) -> torch.Tensor:
    """Correlated, as the logits of a network are, and of unlike spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    scale = torch.logspace(0, -1.5, size)
    return torch.randn(count, size, generator=generator) * scale @ mixing + 0.1 * seed


@pytest.mark.parametrize("real", [84, 500], ids=["fewer clips than features", "more"])
def test_fvd_of_2048_videos_agrees_with_independent_roots(real):
    """scipy's matrix root, and eigenvalues of a symmetric form, from the features alone."""
    linalg = pytest.importorskip("scipy.linalg")
    x, y = random_features(real, 1).double().numpy(), random_features(2048, 2).double().numpy()
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The eigenvalues of a b are those of the smaller form that has no zeros among them.
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    form = centred @ b @ centred.T if real < x.shape[1] else None
    if form is None:
        values, vectors = np.linalg.eigh(b)
        root = vectors * np.sqrt(values) @ vectors.T
        form = root @ a @ root
    trace = np.sqrt(np.linalg.eigvalsh(form).clip(0)).sum()
    ours = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    by_eigenvalues = apart + np.trace(a) + np.trace(b) - 2 * trace
    assert ours == pytest.approx(by_eigenvalues, rel=1e-6)
    if real > x.shape[1]:  # scipy's root of a singular matrix has an error of its own
        by_scipy = apart + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
        assert ours == pytest.approx(by_scipy, rel=1e-6)


def test_fvd_by_label_is_that_of_each_label_by_itself():
    labels = ["a", "a", "b", "b", "b", "c"]
    real = random_features(6, 1, 8)
    generated = [random_features(count, 10 + i, 8) for i, count in enumerate((1, 2, 1, 0, 3, 4))]
    found = by_label(real, generated, labels)
    assert set(found["values"]) == {"a", "b"}  # c has one clip
    b = frechet_distance(real[2:5], torch.cat(generated[2:5]))
    assert found["values"]["b"] == pytest.approx(b)
    values = list(found["values"].values())
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert by_label(real, generated, list("abcdef")) is None


def test_rows_have_fvd_by_class_and_subject(config, monkeypatch):
    """Of a data set that knows them: here two classes, three subjects."""
    from s2dm.data.puppets import PuppetClips

    order = run.shuffled(65)

    def labels(self: PuppetClips, index: int) -> dict[str, str]:
        place = order.index(index)
        return {"class": str(place % 2), "subject": str(place % 3)}

    monkeypatch.setattr(PuppetClips, "labels", labels)
    config = dataclasses.replace(config, variants=(Variant("zero-flow"),))
    result = evaluate(dataclasses.replace(config, videos=20))
    row = result["table"]["zero-flow"]
    assert row["fvd_by_class"]["values"].keys() == {"0", "1"}
    page = (config.output / "results.md").read_text("utf-8")
    assert f"{row['fvd_by_class']['mean']:.1f} ± {row['fvd_by_class']['std']:.1f} (2)" in page
