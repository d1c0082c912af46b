"""`s2dm evaluate`: what it measures, that it goes on where it stopped, and what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from random_checkpoint import tiny_config, write_random_checkpoint
from tiny_evaluation import DATA, count_made, tiny_evaluation

from s2dm import cli
from s2dm.data import Clip, register_dataset
from s2dm.data.puppets import PuppetClips
from s2dm.evaluation import report, run, tables
from s2dm.evaluation.modes import MODES, ClipSampler, Variant
from s2dm.evaluation.protocol import file_hash
from s2dm.evaluation.run import EvaluationConfig, evaluate
from s2dm.flow import FlowField
from s2dm.models import FlowSampling, SamplingConfig
from s2dm.sector import NoiseSharing

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")


@pytest.fixture
def config(checkpoint, tmp_path) -> EvaluationConfig:
    return tiny_evaluation(checkpoint, tmp_path / "out")


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, str]]:
    return count_made(monkeypatch)


def stored(output: Path) -> dict[str, bytes]:
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("*.npz")}


def test_every_mode_becomes_a_row(config):
    modes = [
        "given-flow", "given-flow:independent", "given-flow:mixed:0.3", "two-stage",
        "given-flow-plain", "two-stage-plain", "given-pose", "given-pose-plain", "zero-flow",
        "autoencoder", "true",
    ]  # fmt: skip
    variants = tuple(map(Variant.parse, modes))
    assert {variant.mode for variant in variants} == set(MODES)
    result = evaluate(dataclasses.replace(config, variants=variants, seeds=(0, 1)))
    table = result["table"]
    assert list(table) == modes
    for name, row in table.items():
        assert row["clips"] == 2, name  # the seeds of a clip are no clips of their own
        for metric in ("flow_error", "warp_error", "motion", "attributes"):
            low, high = row[f"{metric}_95"]
            assert low <= row[metric] <= high or row[metric] == pytest.approx(low)
    # What is known of them: equal frames stand still, unequal noise flickers, the truth is true.
    assert table["zero-flow"]["flicker"] == 0 and table["zero-flow"]["motion"] == 0
    assert table["zero-flow"]["flow_error"] == pytest.approx(1)
    assert table["given-flow:independent"]["flicker"] > 2 * table["given-flow"]["flicker"]
    assert table["true"]["attributes"] == 1 and table["true"]["flicker"] < 0.01
    assert table["true"]["flow_error"] < 0.7 * table["zero-flow"]["flow_error"]

    output = config.output
    assert json.loads((output / "results.json").read_text("utf-8")) == result
    page = (output / "results.md").read_text("utf-8")
    for text in (
        "| generated, given flow, independent noise | 2 |",
        "| true clip | 2 |",
        "FVD and KVD are left out",
        "- frames: 3",
        "- size: 32x32",
        "- seeds: 0, 1",
        f"- checkpoint: tiny.safetensors ({file_hash(config.checkpoint)})",
        "stage 1 DPM-Solver++ 2M, 20 steps",
    ):
        assert text in page, text
    from PIL import Image

    for name in ("plots.png", "sheet.jpg"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 64


def test_figures_are_those_of_the_stored_clips(config):
    """The table from the files alone, by the metrics themselves."""
    from s2dm.evaluation.clip_metrics import flicker, pooled_figure, warp_error
    from s2dm.video.frames import from_uint8

    row = evaluate(config)["table"]["given-flow"]
    clips = PuppetClips("test", takes=1, size=32, frames=3)
    warp, still = [], []
    for path in (config.output / "clips").glob("given-flow*/*.npz"):
        frames = torch.stack([from_uint8(f) for f in np.load(path)["frames"]])
        clip = clips[int(path.stem.split("_")[0])]
        warp.append(warp_error(frames, clip.flow))
        still.append(flicker(frames, clip.still))
    assert len(warp) == 2
    assert row["warp_error"] == pytest.approx(pooled_figure(warp))
    assert row["flicker"] == pytest.approx(pooled_figure(still))


def test_each_clip_starts_from_noise_of_its_own(config):
    """And the noise of a clip does not depend on which others are evaluated."""
    variants = (Variant("zero-flow"),)
    evaluate(dataclasses.replace(config, variants=variants, seeds=(0, 1)))
    first = stored(config.output)
    assert len(first) == 4 and len(set(first.values())) == 4
    evaluate(dataclasses.replace(config, variants=variants, clips=1, output=config.output / "one"))
    (name,) = stored(config.output / "one")
    with np.load(config.output / name) as a, np.load(config.output / "one" / name) as b:
        assert np.array_equal(a["frames"], b["frames"])


# --------------------------------------------------------------------------------- resuming


def test_a_stopped_run_goes_on_where_it_was(config, made, monkeypatch):
    whole = evaluate(dataclasses.replace(config, output=config.output / "whole"))
    assert len(made) == 4
    made.clear()

    counted = Variant.make

    def stop(self, generator, clip, seed):
        if len(made) == 2:
            raise KeyboardInterrupt
        return counted(self, generator, clip, seed)

    monkeypatch.setattr(Variant, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert not (config.output / "results.json").exists()
    done = list(made)
    monkeypatch.setattr(Variant, "make", counted)
    again = evaluate(config)
    assert len(made) == 4 and len(set(made)) == 4 and made[:2] == done
    assert again["table"] == whole["table"]

    made.clear()
    assert evaluate(config)["table"] == whole["table"]
    assert made == []  # nothing left to do


def test_more_clips_are_added_to_those_that_are_there(config, made):
    evaluate(dataclasses.replace(config, clips=1))
    assert len(made) == 2
    evaluate(dataclasses.replace(config, clips=3))
    assert len(made) == 6 and len(set(made)) == 6
    evaluate(
        dataclasses.replace(config, clips=3, variants=(*config.variants, Variant("zero-flow")))
    )
    assert [row for row, _ in made[6:]] == ["zero-flow"] * 3


def test_other_settings_are_never_mixed(config, made, tmp_path):
    evaluate(config)
    other = write_random_checkpoint(tmp_path / "other.safetensors", seed=1)
    for change in (
        {"sampling": {"steps": 2}},
        {"sampling": {"steps": 1, "guidance_scale": 3}},
        {"sampling": {"steps": 1, "flow_start": 1.0}},
        {"flow_sampling": FlowSampling(3)},
        {"checkpoint": other},
        {"data": dataclasses.replace(DATA, size=40)},
        {"data": dataclasses.replace(DATA, options={"first_take": 7})},
        {"seeds": (5,)},
        {"variants": (Variant("given-flow", NoiseSharing("independent")),)},
        {"method": "farneback"},
        {"method": None},
    ):
        made.clear()
        evaluate(dataclasses.replace(config, clips=1, **change))
        assert any(row.startswith("given-flow") for row, _ in made), change


def test_clips_of_data_that_changed_are_never_mixed(config, made, monkeypatch):
    """The same settings, but another caption, other frames or another flow in each clip."""
    scene = Folder()[1]
    paler = dataclasses.replace(scene, frames=scene.frames // 2)
    slower = FlowField(scene.flow.displacement / 2, scene.flow.occlusion)
    slower = dataclasses.replace(scene, flow=slower)
    config = dataclasses.replace(config, data=dataclasses.replace(DATA, name="plain-folder"))
    for clip in (scene, dataclasses.replace(scene, caption="another"), paler, slower):
        monkeypatch.setattr(Folder, "__getitem__", lambda self, index, clip=clip: clip)
        for expected in (4, 0):  # the truth, too
            made.clear()
            evaluate(config)
            assert len(made) == expected


def test_clips_that_a_data_set_says_have_changed_are_made_anew(config, made, monkeypatch):
    config = dataclasses.replace(config, data=dataclasses.replace(DATA, name="plain-folder"))
    for fingerprint in ("before", "after"):
        monkeypatch.setattr(Folder, "fingerprint", fingerprint, raising=False)
        for expected in (4, 0):
            made.clear()
            evaluate(config)
            assert len(made) == expected


def test_protocol_names_the_code_that_made_the_clips(config, monkeypatch):
    versions = []
    for code, clips in (("1", 1), ("1", 1), ("2", 2), ("3", 2)):
        monkeypatch.setattr(run, "code_version", lambda code=code: code)
        card = evaluate(dataclasses.replace(config, clips=clips))["protocol"]
        assert card["code"] == code
        versions.append(card.get("code of the clips"))
    assert versions == [None, None, "1; 2", "1; 2"]


@pytest.mark.parametrize("half", [False, True])
def test_frames_that_are_not_finite_are_refused(config, monkeypatch, half):
    from s2dm.evaluation.modes import Made, Mode

    def broken(generator: ClipSampler, clip, variant, seed) -> Made:
        return Made(torch.full((3, 3, 32, 32), torch.nan), clip.flow, clip.still)

    monkeypatch.setitem(MODES, "broken", Mode("broken", broken))
    config = dataclasses.replace(config, variants=(Variant("broken"),), half=half)
    remedy = "without --half" if half else "look at the checkpoint"
    with pytest.raises(ValueError, match=f"finite frames of row broken, clip .*{remedy}"):
        evaluate(config)
    assert stored(config.output) == {}


def test_without_an_estimator_all_but_its_figures_are_there(config):
    variants = (Variant("given-flow"), Variant("two-stage"))
    config = dataclasses.replace(config, clips=2, variants=variants)
    full, brief = (evaluate(dataclasses.replace(config, method=m)) for m in ("dis", None))
    assert set(brief["table"]) == set(full["table"]) == {"given-flow", "two-stage"}
    for name, row in brief["table"].items():
        left_out = {key for key in full["table"][name] if key not in row}
        assert left_out == {
            f"{metric}{end}"
            for metric in ("flow_error", "flow_error_pixels", "motion", "given_motion")
            for end in ("", "_95")
        }
        assert all(full["table"][name][key] == row[key] for key in row)
    assert "flow error" in full["protocol"] and "flow error" not in brief["protocol"]


def test_a_checkpoint_is_sampled_as_it_recommends(config, made, tmp_path):
    recommended = SamplingConfig(1, guidance_scale=2.5, flow_guidance_scale=1.5, flow_start=1.0)
    path = tmp_path / "recommends.safetensors"
    write_random_checkpoint(path, tiny_config(sampling=recommended))
    config = dataclasses.replace(config, checkpoint=path, clips=1, sampling={})
    protocol = evaluate(config)["protocol"]
    assert protocol["sampling"].startswith("DDIM, 1 steps, guidance 2.5 (flow 1.5), flow from 1, ")
    made.clear()
    # The same numbers, given: the clips are there already.
    evaluate(dataclasses.replace(config, sampling=recommended.to_dict()))
    assert not made
    given = dataclasses.replace(config, sampling={"guidance_scale": 3.0})
    assert "1 steps, guidance 3 (flow 1.5)" in evaluate(given)["protocol"]["sampling"]
    assert made


def test_a_flow_that_never_starts_moves_nothing(config):
    sampling = {"steps": 2, "guidance_scale": 1.0}
    never = dataclasses.replace(config, sampling=sampling | {"flow_start": 1.0})
    row = evaluate(never)
    assert row["table"]["given-flow"]["flicker"] == 0  # frames that share their noise are one
    row = evaluate(dataclasses.replace(config, sampling=sampling))
    assert row["table"]["given-flow"]["flicker"] > 0


def test_half_precision_of_a_cpu_is_bfloat16(config):
    """Other clips than in float32, but hardly, of all that a checkpoint makes."""
    variants = tuple(map(Variant, ("given-flow", "two-stage", "autoencoder", "true")))
    folders = {}
    for half, name in ((False, "float32"), (True, "bfloat16")):
        result = evaluate(dataclasses.replace(config, half=half, clips=1, variants=variants))
        assert f", {name};" in result["protocol"]["sampling"]
        folders[name] = result["clips"]
    assert folders["float32"]["true"] == folders["bfloat16"]["true"]
    for variant in variants[:-1]:
        whole, half = (
            np.load(next((config.output / rows[str(variant)]).glob("*.npz")))["frames"]
            for rows in folders.values()
        )
        distance = np.abs(whole.astype(float) - half).mean()
        assert 0 < distance < 3, (variant, distance)


def test_the_truth_is_made_once_for_all_checkpoints(config, made, tmp_path):
    evaluate(config)
    made.clear()
    other = write_random_checkpoint(tmp_path / "other.safetensors", seed=1)
    evaluate(dataclasses.replace(config, checkpoint=other))
    assert [row for row, _ in made] == ["given-flow"] * 2


# ---------------------------------------------------------------------------------- several


@pytest.mark.slow
def test_two_processes_share_the_clips(config):
    alone = evaluate(dataclasses.replace(config, clips=3))
    output = config.output.with_name("shared")
    command = ["-m", "s2dm.cli", "evaluate", "--checkpoint", config.checkpoint, "-o", output]
    command += ["--modes", "given-flow", "true", "--clips", 3, "--steps", 1]
    told = run_processes(2, *command, "--data", "size=32", "frames=3", "--cpu")
    shared = json.loads((output / "results.json").read_text("utf-8"))
    assert shared["table"] == alone["table"]
    assert told.count("| true clip |") == 1  # the main process alone speaks


# -------------------------------------------------------------------------------- data sets


class Folder:
    """Clips of bytes, of which nobody knows what stands still or which colours they show."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Clip:
        frames = torch.full((3, 3, 32, 32), 128, dtype=torch.uint8)
        displacement = torch.zeros(3, 2, 32, 32)
        for number in range(3):
            frames[number, :, 2:8, 2 + 2 * number : 8 + 2 * number] = 30 * index
            displacement[number, 0, 2:8, 2 + 2 * number : 8 + 2 * number] = -2 * number
        return Clip(frames, FlowField(displacement, torch.zeros(3, 1, 32, 32)), f"square {index}")


register_dataset("plain-folder", lambda config, split: Folder())


def test_clips_with_frames_flow_and_caption_are_enough(config):
    data = dataclasses.replace(DATA, name="plain-folder")
    row = evaluate(dataclasses.replace(config, data=data))["table"]["true"]
    assert "attributes" not in row
    assert row["flicker"] == 0 and row["given_motion"] == pytest.approx(3)
    assert "attributes" not in (config.output / "results.md").read_text("utf-8").split("```")[0]


# ------------------------------------------------------------------------------------ errors


def test_settings_that_do_not_fit_are_refused_before_anything_runs(config, made, tmp_path):
    stage_2 = write_random_checkpoint(tmp_path / "s.safetensors", tiny_config(flow_generator=None))
    for change, message in (
        ({"clips": 1000}, "from 1 to 65 clips"),
        ({"i3d": Path("a")}, "at least 9 frames, got 3"),
        ({"variants": ()}, "variants.*none"),
        ({"variants": (Variant("true"), Variant("true"))}, "different variants"),
        ({"seeds": (1, 1)}, "different seeds"),
        ({"checkpoint": stage_2, "variants": (Variant("two-stage"),)}, "no flow generator"),
        ({"data": dataclasses.replace(DATA, name="nothing")}, "unknown data set"),
        ({"data": dataclasses.replace(DATA, estimated_flow=1.0)}, "setting of trainings alone"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(dataclasses.replace(config, **change))
    with pytest.raises(ValueError, match="at least 2 clips"):
        data = dataclasses.replace(DATA, frames=9)
        evaluate(dataclasses.replace(config, data=data, clips=1, i3d=Path("a")))
    with pytest.raises(FileNotFoundError):
        data = dataclasses.replace(DATA, frames=9)
        evaluate(dataclasses.replace(config, data=data, i3d=tmp_path / "missing"))
    assert made == []


# -------------------------------------------------------------------------------------- rows


def test_seeds_and_takes_of_a_clip_count_as_one(config, monkeypatch):
    """However often a clip is generated: figures of equal seeds have the interval of one."""
    from s2dm.evaluation.modes import Mode, _true

    seen = []

    def bootstrap_interval(statistic, *sets, groups, go_on=tables.bootstrap_interval, **others):
        seen.append((len(sets[0]), groups))
        return go_on(statistic, *sets, groups=groups, **others)

    monkeypatch.setattr(tables, "bootstrap_interval", bootstrap_interval)
    monkeypatch.setitem(MODES, "equal", Mode("equal", _true, shares=False))
    variants = (Variant("equal"), Variant("true"))
    data = dataclasses.replace(DATA, takes=2)
    config = dataclasses.replace(config, variants=variants, data=data, clips=3, method=None)
    table = evaluate(dataclasses.replace(config, seeds=(0, 1, 2)))["table"]
    assert table["equal"]["warp_error_95"] == pytest.approx(table["true"]["warp_error_95"])
    groups = [index % 65 for index in run.shuffled(130)[:3]]
    assert seen and all(entry == (3, groups) for entry in seen)
    assert report.take_groups([0, 65, 129, 64], 130, 2) == [0, 0, 64, 64]


def test_a_new_mode_is_one_entry(config, monkeypatch):
    from s2dm.evaluation.modes import Made, Mode

    def grey(generator: ClipSampler, clip, variant, seed) -> Made:
        return Made(torch.full_like(clip.frames, 0.5), clip.flow, clip.still)

    monkeypatch.setitem(MODES, "grey", Mode("grey", grey, sampled=False))
    row = evaluate(dataclasses.replace(config, variants=(Variant("grey"),)))["table"]["grey"]
    assert row["motion"] == 0 and row["warp_error"] == pytest.approx(0, abs=1e-4)


def test_a_mode_that_was_given_no_flow_is_measured_by_none(config, monkeypatch):
    from s2dm.evaluation.modes import Made, Mode

    def flickering(generator: ClipSampler, clip, variant, seed) -> Made:
        """Grey, 2 of 255 lighter in every other frame."""
        frames = torch.full_like(clip.frames, 100 / 255, dtype=torch.float32)
        frames[1::2] += 2 / 255
        return Made(frames, flow=None, still=None)

    monkeypatch.setitem(MODES, "grey", Mode("grey", flickering, shares=False))
    with pytest.raises(ValueError, match="grey has no noise to share"):
        Variant("grey", NoiseSharing("independent"))
    assert Variant("grey").title == "grey"
    config = dataclasses.replace(config, variants=(Variant("grey"), Variant("true")))
    table = evaluate(config)["table"]
    assert not set(table["grey"]) & {"flow_error", "motion", "given_motion", "warp_error"}
    values = torch.tensor([100.0, 102.0, 100.0])
    assert table["grey"]["flicker"] == pytest.approx(values.std(correction=0).item(), rel=1e-3)
    assert "flow_error" in table["true"]


def test_clips_of_another_recipe_are_others(config, monkeypatch):
    from s2dm.evaluation.modes import Mode, _zero_flow

    for number, recipe in enumerate(("", "weights 1", "weights 2", "weights 2"), start=1):
        monkeypatch.setitem(MODES, "own", Mode("own", _zero_flow, recipe=recipe))
        card = evaluate(dataclasses.replace(config, variants=(Variant("own"),)))["protocol"]
        assert card.get("own", "") == recipe
        assert len(stored(config.output)) == 2 * min(number, 3)


# -------------------------------------------------------------------------------- the command


def run_command(*arguments: object) -> int:
    return cli.main(["evaluate", *(str(argument) for argument in arguments)])


def test_command_prints_the_table(checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    code = run_command(
        "--checkpoint", checkpoint, "-o", output, "--modes", "given-flow:independent", "true",
        "--data", "size=32", "options.first_take=5", "--clips", 1, "--steps", 1, "--cpu",
        "--flow-start", 0.25,
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert "| generated, given flow, independent noise | 1 |" in printed
    assert printed.strip().endswith(str(output / "results.md"))
    protocol = json.loads((output / "results.json").read_text("utf-8"))["protocol"]
    assert protocol["frames"] == 4  # the checkpoint's
    assert "first_take 5" in protocol["data"] and "flow from 0.25" in protocol["sampling"]


def test_command_explains_errors_in_one_line(checkpoint, tmp_path, capsys):
    base = ("--checkpoint", checkpoint, "-o", tmp_path / "o", "--cpu")
    for arguments, expected in (
        ((*base, "--modes", "dream"), "Expected one of given-flow"),
        ((*base, "--data", "colour=red"), "unknown setting 'colour'"),
        ((*base, "--data", "frames=9", "--i3d", checkpoint), "expected SHA-256"),
        ((*base, "--data", "frames=9", "--i3d", tmp_path / "no.pt"), "no.pt"),
        (("--checkpoint", tmp_path / "none"), "There is no checkpoint"),
        (("--checkpoint", tmp_path), "s2dm convert"),
    ):
        assert run_command(*arguments) == 1
        error = capsys.readouterr().err
        assert expected in error and error.startswith("s2dm evaluate: ")
        assert error.strip().count("\n") == 0
    assert not (tmp_path / "o").exists()
