"""The paper's tables: rows of the same clips, ratios of their FVD, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import random_states, tiny_config
from tiny_training import stage2_config

from s2dm.data import DataConfig
from s2dm.evaluation import run
from s2dm.evaluation.distances import frechet_distance
from s2dm.evaluation.i3d import VideoFeatures
from s2dm.evaluation.modes import Variant
from s2dm.models import Checkpoint, S2DMConfig, save_checkpoint
from s2dm.sector import SHARED, NoiseSharing
from s2dm.settings import read_settings
from s2dm.training.stage2 import Stage2TrainingConfig, build_stage2_task

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ablation
import comparison
import noise_in_training
import report
import table1

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

CONFIGS = Path(__file__).resolve().parents[2] / "s2dm" / "training" / "configs"
CONFIG = tiny_config(resolution=(32, 32), frames=9)


def save(path: Path, config: S2DMConfig = CONFIG, denoiser: int = 0, rest: int = 0) -> Path:
    """A checkpoint with random weights by two seeds: of the U-Net, and of everything else."""
    states = random_states(config, rest)
    states["unet"] = random_states(config, denoiser)["unet"]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Checkpoint(config, states))
    return path


def trained(folder: Path, config: S2DMConfig = CONFIG, steps: int = 8, **settings: object) -> Path:
    """A checkpoint as a training run leaves it."""
    path = save(folder / "export.safetensors", config)
    made_with = {"output": str(folder), "clips": 8, "clip_frames": 4, "seed": 0, **settings}
    (folder / "config.json").write_text(json.dumps(made_with))
    records = [{"step": steps, "sample_error": 0.1}, {"step": steps + 2, "loss": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


INDEPENDENT = dataclasses.replace(CONFIG, noise_sharing="independent")
SHARING = ("noise_sharing", ("shared", "independent"))


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[tuple[str, str, int, str]]:
    """Every clip that is made for an evaluation; a stand-in for I3D; results in a folder."""

    def features(video: torch.Tensor) -> torch.Tensor:
        return torch.cat([video.mean((2, 3, 4)), video.std((2, 3, 4))], dim=1)

    calls = []
    make = Variant.make

    def counted(self, generator, clip, seed):
        calls.append((generator.checkpoint.parent.name, str(self), seed, clip.caption))
        return make(self, generator, clip, seed)

    monkeypatch.setattr(run, "load_i3d", lambda *_: VideoFeatures(features, "stand-in", "none"))
    monkeypatch.setattr(Variant, "make", counted)
    monkeypatch.setattr(comparison, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(comparison, "SHEET_CLIPS", 1)
    return calls


def run_table(monkeypatch, module, output: Path, *arguments: object) -> dict:
    common = ["--clips", 3, "--takes", 1, "--steps", 1, "--samples", 5, "--i3d", "a", "--cpu"]
    words = [str(word) for word in (*arguments, *common, "--output", output)]
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    module.main()
    return json.loads(output.read_text("utf-8"))


# ---------------------------------------------------------------------------------- ablation


@pytest.mark.slow
def test_ablation_fills_its_cells_from_two_trainings(made, monkeypatch, tmp_path):
    files = {
        "--shared": save(tmp_path / "shared" / "a.safetensors"),
        "--independent": save(tmp_path / "own" / "a.safetensors", INDEPENDENT, denoiser=1),
    }
    arguments = [word for pair in files.items() for word in pair]
    output = tmp_path / "results" / "ablation.json"

    def stop(self, generator, clip, seed, go_on=Variant.make):
        if len(made) == 9:
            raise KeyboardInterrupt
        return go_on(self, generator, clip, seed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Variant, "make", stop)
        run_table(patch, ablation, output, *arguments, "--seeds", 0, 1)
    assert not output.exists()
    result = run_table(monkeypatch, ablation, output, *arguments, "--seeds", 0, 1)

    cells = [
        ("shared", "given-flow", 6),
        ("shared", "given-flow:independent", 6),
        ("own", "given-flow:independent", 6),
        ("own", "given-flow", 6),
        ("shared", "autoencoder", 3),
        ("shared", "true", 3),  # once for both checkpoints
    ]
    assert len(made) == sum(count for *_, count in cells)  # the sheet shows what was measured
    for folder, mode, count in cells:
        assert len({m for m in made if m[:2] == (folder, mode)}) == count

    table = result["table"]
    assert list(table) == ["I", "II", "III", "IV", "autoencoder"]
    for name in ("I", "II", "III", "IV"):
        assert table[name]["clips"] == 3
        assert table[name]["fvd"] == pytest.approx(sum(table[name]["fvd_seeds"]) / 2)
        assert table[name]["kvd"] == pytest.approx(sum(table[name]["kvd_seeds"]) / 2)
    for cell in ("I", "IV"):  # sampled with independent noise, they flicker
        assert 2 * table[cell]["flicker"] < min(table["II"]["flicker"], table["III"]["flicker"])
    entry = result["ratios"]["III"]["I"]
    assert entry["ratio"] == pytest.approx(table["I"]["fvd"] / table["III"]["fvd"])
    assert entry["ratio_95"][0] < entry["ratio_95"][1]
    protocol = result["protocol"]
    assert protocol["command"].startswith("python benchmarks/ablation.py --shared")
    assert "I, II, autoencoder: a.safetensors (" in protocol["checkpoint"]
    assert "III, IV: a.safetensors (" in protocol["checkpoint"]
    assert protocol["clips"] == 3 and protocol["seeds"] == [0, 1]
    assert "first_take 1000" in protocol["data"] and "unknown" in protocol["training"]
    assert (output.parent / result["sheet"]).stat().st_size > 1000
    page = report.SECTIONS["ablation"](result)
    assert "(IV) shared in sampling only" in page and "| 0.87 | 0.74 |" in page
    for cell, other in (("I", "II"), ("IV", "III"), ("I", "IV"), ("II", "III")):
        ratio = table[cell]["fvd"] / table[other]["fvd"]
        assert f": ({cell}) over ({other}) | {ratio:.2f} (" in page


def test_ablation_says_what_is_met():
    def result(first: float, second: float, third: float) -> dict:
        entry = lambda ratio: {"ratio": ratio, "ratio_95": [ratio - 0.1, ratio + 0.1]}  # noqa: E731
        return {
            "ratios": {"III": {"I": entry(first), "II": entry(third)}, "I": {"II": entry(second)}}
        }

    checks = ablation.checks(result(0.87, 1.01, 0.99))
    assert [check.met for check in checks] == [True, True, True]
    for check, limit in zip(checks, ("0.87", "1", "1"), strict=True):
        assert str(check).endswith(f", met (the interval contains the limit, {limit}).")
    checks = ablation.checks(result(0.88, 0.99, 1))
    assert [check.met for check in checks] == [False, False, False]
    assert "**missed** (the interval contains" in str(checks[0])
    text = str(ablation.checks(result(0.7, 1.2, 0.8))[0])
    assert text.endswith("0.866 on MHAD, 0.738 on MUG): 0.70 (0.60 to 0.80), met.")


def compared(**fields: object) -> comparison.Compared:
    """Rows without clips. Each clip is by itself."""
    unknown = {"protocol": {}, "table": {}, "notes": [], "real": torch.zeros(0, 3)}
    unknown |= {"generated": {}, "data": DataConfig(), "folders": {}}
    fields = {**unknown, **fields}
    return comparison.Compared(**{"groups": list(range(len(fields["real"]))), **fields})


def test_ratios_draw_all_takes_of_a_combination():
    """Takes that are equal say no more than one of them: the interval is that of one take."""
    source = torch.Generator().manual_seed(0)
    real, near, far = (torch.randn(30, 3, generator=source) + shift for shift in (0.0, 0.5, 1.0))
    widths = []
    for takes, groups in ((1, 30), (4, 30), (4, 120)):
        rows = {"near": near.repeat(takes, 1)[:, None], "far": far.repeat(takes, 1)[:, None]}
        found = compared(
            table={"near": {"fvd": 1.0}, "far": {"fvd": 2.0}},
            real=real.repeat(takes, 1),
            generated=rows,
            groups=[clip % groups for clip in range(30 * takes)],
        )
        low, high = found.ratios("far", samples=100)["far"]["near"]["ratio_95"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] < 0.7 * widths[0]


def test_fvd_of_few_clips_is_extrapolated_to_many():
    """Normal features of as many numbers as clips, whose means lie 2 apart: FVD of 4."""
    source = torch.Generator().manual_seed(0)
    real, row = (torch.randn(512, 200, generator=source) for _ in range(2))
    row[:, 0] += 2
    found = comparison.extrapolated(real, row[:, None])
    assert list(found["fvd_by_clips"]) == ["128", "256", "512"]
    few, more, all_of_them = found["fvd_by_clips"].values()
    assert few > more > all_of_them == frechet_distance(real, row)
    assert all_of_them > 20 and abs(found["fvd_extrapolated"] - 4) < 6
    assert "fvd_extrapolated" not in comparison.extrapolated(real[:200], row[:200, None])
    # 256 and 260 are too near each other for a line.
    assert [*comparison.extrapolated(real[:260], row[:260, None])["fvd_by_clips"]] == ["128", "260"]


def test_ratio_of_known_distances_lies_in_its_interval():
    """Normal features whose means lie 2 and 4 from the true ones: FVD of 12 and 48."""
    source = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(40):
        real, near, far = (
            torch.randn(100, 3, generator=source) + shift for shift in (0.0, 2.0, 4.0)
        )
        rows = {"near": near[:, None], "far": far[:, None]}
        table = {name: {"fvd": frechet_distance(real, row[:, 0])} for name, row in rows.items()}
        found = compared(table=table, real=real, generated=rows).ratios("far", samples=60)
        assert list(found["far"]) == ["near"]
        low, high = found["far"]["near"]["ratio_95"]
        assert low < found["far"]["near"]["ratio"] < high
        inside += low <= 12 / 48 <= high
    assert 33 <= inside <= 40


# ------------------------------------------------------------------------- what was trained


def test_trainings_that_differ_in_the_setting_alone_are_compared(tmp_path):
    shared = trained(tmp_path / "a", noise_sharing="shared", threads=1)
    own = trained(tmp_path / "b", INDEPENDENT, noise_sharing="independent", threads=2)
    text = comparison.check_trainings(shared, own, *SHARING)
    assert text.startswith(
        "8 steps of 8 clips with 4 frames, seed 0, on latents of 4 channels; "
        "the runs differ in noise"
    )
    token = trained(
        tmp_path / "c", tiny_config("token", resolution=(32, 32), frames=9), fusion="token"
    )
    with pytest.raises(ValueError, match=r"differ in noise_sharing\."):  # not set in its run
        comparison.check_trainings(shared, token, "fusion", ("channel", "token"))
    (shared.parent / "config.json").unlink()
    assert "unknown" in comparison.check_trainings(shared, token, "fusion", ("channel", "token"))


def test_other_trainings_are_refused(tmp_path):
    shared = trained(tmp_path / "a")
    own = trained(tmp_path / "b", INDEPENDENT)
    another = dataclasses.replace(INDEPENDENT, frames=16)
    for first, second, message in (
        (own, own, "b.*expected noise_sharing = shared in training, got independent"),
        (shared, shared, "a.*expected noise_sharing = independent in training, got shared"),
        (shared, trained(tmp_path / "c", INDEPENDENT, seed=1), "differ in seed"),
        (shared, trained(tmp_path / "d", INDEPENDENT, steps=9), "8 and for 9 steps"),
        (shared, trained(tmp_path / "e", another), "configuration than noise_sharing"),
        (shared, save(tmp_path / "f" / "x.safetensors", INDEPENDENT, rest=3), "in their vae"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison.check_trainings(first, second, *SHARING)


def test_runs_that_are_compared_start_alike_and_see_the_same_batches(vae_file, tmp_path):
    started, batches = {}, {}
    for name, settings in (
        ("shared", {}),
        ("independent", {"noise_sharing": "independent"}),
        ("token", {"fusion": "token"}),
    ):
        cache = str(tmp_path / "cache")
        task = build_stage2_task(
            stage2_config(tmp_path / name, vae_file, cache=cache, **settings), torch.device("cpu")
        )
        started[name] = task.model.unet.state_dict()
        generator = torch.Generator().manual_seed(1)
        batches[name] = task.batch(generator, torch.device("cpu"))
    for name in ("independent", "token"):
        for key, value in started["shared"].items():
            assert torch.equal(value, started[name][key]), key
        for key, value in batches["shared"].items():
            alike = key != "noise" or name == "token"
            assert torch.equal(value, batches[name][key]) == alike, key


def test_the_shipped_config_has_a_budget_in_steps_and_the_data_of_the_bundled_model():
    ablation, bundled = (
        read_settings(Stage2TrainingConfig, CONFIGS / f"puppets_{name}.toml")
        for name in ("ablation", "stage2")
    )
    assert ablation.steps < 10_000 and ablation.max_minutes == 0
    assert ablation.data == bundled.data  # so that they can share a cache
    assert ablation.clip_frames > 1  # or there is nothing to share
    assert (ablation.noise_sharing, ablation.fusion) == ("shared", "channel")


# ----------------------------------------------------------------------------------- table 1


@pytest.mark.slow
def test_table_1_sets_two_stages_beside_given_flow_and_baselines(made, monkeypatch, tmp_path):
    checkpoint = save(tmp_path / "both" / "a.safetensors")
    output = tmp_path / "results" / "table1.json"
    result = run_table(monkeypatch, table1, output, "--checkpoint", checkpoint)
    table = result["table"]
    ours = ["given flow", "two stages"]
    assert list(table) == [*ours, *(f"{name}, anchored" for name in ours)]
    entry = result["ratios"]["given flow"]["two stages"]
    assert entry["ratio"] == pytest.approx(table["two stages"]["fvd"] / table["given flow"]["fvd"])

    other = {"clips": 3, "fvd": 2 * table["two stages"]["fvd"], "fvd_95": [0.0, 1.0]}
    file = tmp_path / "vdm.json"
    protocol = {**result["protocol"], "command": "made elsewhere"}
    file.write_text(json.dumps({"protocol": protocol, "table": {"vdm": other}}))
    made.clear()
    result = run_table(
        monkeypatch, table1, output, "--checkpoint", checkpoint, "--row", f"VDM={file}"
    )
    assert made == []  # the clips were there, for the sheet, too
    assert result["table"]["VDM"] == other
    text = f"FVD of two stages below that of VDM: {other['fvd'] / 2:.1f} to {other['fvd']:.1f}"
    assert table1.checks(result)[1] == comparison.Check(text, True)
    assert result["protocols"] == {"VDM": protocol}
    page = report.SECTIONS["table1"](result)
    assert "| VDM | 3 | –" in page and "| 6.49 | 3.83 |" in page


def test_table_1_says_what_is_met():
    entry = {"ratio": 1.4, "ratio_95": [1.3, 1.5]}
    result = {
        "table": {"two stages": {"fvd": 10.0}, "VDM": {"fvd": 9.0}, "LFDM": {"fvd": 1.0}},
        "ratios": {"given flow": {"two stages": entry}, "two stages": {}},
    }
    assert [check.met for check in table1.checks(result)] == [False, False, None]
    assert str(table1.checks(result)[2]).endswith("LVDM, **not measured**.")
    entry["ratio"] = 1.39
    result["table"]["VDM"]["fvd"] = 11.0
    result["table"]["LVDM"] = {"fvd": 12.0}
    result["ratios"]["two stages"]["VDM"] = {"ratio": 1.1, "ratio_95": [0.9, 1.3]}
    texts = [str(check) for check in table1.checks(result)]
    assert texts[0].endswith("1.39 (1.30 to 1.50), met (the interval contains the limit, 1.4).")
    assert texts[1].endswith(
        "10.0 to 11.0, which is 1.10 (0.90 to 1.30) times as large, met (the interval contains the "
        "limit, 1)."
    )
    assert texts[2].endswith("10.0 to 12.0, met.")


PROTOCOL = {
    "data": "puppets, test split", "clips": 512, "frames": 16, "size": [128, 128],
    "value_range": [0.0, 1.0], "features": "I3D (abc)", "seeds": [0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("data", "puppets, train split"), ("clips", 65), ("frames", 8), ("size", [64, 64]),
        ("features", "another I3D"), ("features", None),
    ],
)  # fmt: skip
def test_rows_of_another_protocol_are_refused(tmp_path, entry, value):
    file = tmp_path / "results.json"
    protocol = {**PROTOCOL, entry: value}
    file.write_text(json.dumps({"protocol": protocol, "table": {"vdm": {"fvd": 1.0}}}))
    with pytest.raises(ValueError, match=f"VDM was evaluated under another.*its {entry} is"):
        comparison.add_row(compared(protocol=PROTOCOL), f"VDM={file}")


def test_rows_are_named_and_chosen(tmp_path):
    file = tmp_path / "results.json"
    table = {"vdm": {"fvd": 1.0}, "lvdm": {"fvd": 2.0}, "true": {"flicker": 0.0}}
    file.write_text(json.dumps({"protocol": {**PROTOCOL, "seeds": [5]}, "table": table}))
    ours = compared(protocol=PROTOCOL, table={"own": {"fvd": 3.0}})
    found = comparison.add_row(ours, f"LVDM={file}#lvdm")
    assert found.table == {"own": {"fvd": 3.0}, "LVDM": {"fvd": 2.0}}
    assert found.protocols == {"LVDM": {**PROTOCOL, "seeds": [5]}} and found.generated == {}
    assert found.folders == ours.folders
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**content, "clips": {"lvdm": "clips/lvdm-1"}}))
    (tmp_path / "clips" / "lvdm-1").mkdir(parents=True)
    found = comparison.add_row(ours, f"LVDM={file}#lvdm")
    assert found.folders == {**ours.folders, "LVDM": tmp_path / "clips" / "lvdm-1"}
    for text, message in (
        (f"VDM={file}", r"as VDM=.*#ROW\. Rows: vdm, lvdm"),
        (f"VDM={file}#true", "Rows: vdm, lvdm"),
        (str(file), "NAME=FILE"),
        (f"={file}", "NAME=FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison.add_row(ours, text)
    file.write_text(json.dumps({"protocol": PROTOCOL, "table": {"vdm": {"flicker": 0.0}}}))
    with pytest.raises(ValueError, match="evaluate with --i3d"):
        comparison.add_row(ours, f"VDM={file}")
    file.write_text("{}")
    with pytest.raises(ValueError, match="no result of an evaluation"):
        comparison.add_row(ours, f"VDM={file}")


def test_features_beside_the_file_give_a_row_ratios_or_refuse_it(tmp_path):
    source = torch.Generator().manual_seed(0)
    real, own, other = (torch.randn(40, 3, generator=source) + shift for shift in (0, 1, 2))
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"protocol": PROTOCOL, "table": {"vdm": {"fvd": 12.0}}}))
    ours = compared(
        protocol=PROTOCOL, table={"own": {"fvd": 3.0}}, real=real, generated={"own": own[:, None]}
    )
    # Another machine differs a little.
    for true, message in ((real + 1e-4, ""), (real + 0.01, "other true"), (real[1:], "other true")):
        np.savez(tmp_path / "features.npz", true=true[:, None], vdm=other[:, None])
        if message:
            with pytest.raises(ValueError, match=f"VDM was compared with {message} clips"):
                comparison.add_row(ours, f"VDM={file}")
            continue
        entry = comparison.add_row(ours, f"VDM={file}").ratios("own", samples=50)["own"]["VDM"]
        assert entry["ratio"] == 4
        assert 1 < entry["ratio_95"][0] < entry["ratio_95"][1]


# ------------------------------------------------------------------------- noise in training


class Mean(torch.nn.Module):
    """Its loss is the mean of the noise times a weight, so its gradient is that mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss": self.weight * batch["noise"].mean()}


def test_the_gradient_of_shared_noise_scatters_more():
    """Of 2 clips with 4 frames each: two draws a batch in place of eight."""

    class Task:
        def __init__(self, sharing):
            self.model, self.sharing = Mean(), sharing

        def batch(self, generator, device):
            noise = [self.sharing.draw(4, (1, 2, 2), generator) for _ in range(2)]
            return {"noise": torch.stack(noise)}

    shared, independent = (
        noise_in_training.measure(Task(sharing), 2000)
        for sharing in (SHARED, NoiseSharing("independent"))
    )
    # A mean of n normal numbers has a variance of 1/n; a frame has four numbers.
    assert shared["gradient_variance"] == pytest.approx(1 / 8, rel=0.1)
    assert independent["gradient_variance"] == pytest.approx(1 / 32, rel=0.1)
    for row in (shared, independent):
        assert abs(row["loss"]) < 4 * row["loss_standard_error"]
        expected = (row["gradient_variance"] / 2000) ** 0.5
        assert row["loss_standard_error"] == pytest.approx(expected, rel=0.05)


# ------------------------------------------------------------------------------- the report


def test_report_leaves_out_what_was_not_measured(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "docs" / "results")
    report.main()
    page = (tmp_path / "docs" / "results.md").read_text("utf-8")
    assert page.startswith("# Results") and "Table" not in page
