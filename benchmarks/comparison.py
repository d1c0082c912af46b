"""What the paper's tables share: rows made of the same clips, and the ratios of their FVD.

A row is a checkpoint with a mode of `s2dm evaluate`, or the result of an evaluation that was made
elsewhere under the same protocol. All rows of a run keep their clips in one folder, so that the
true clips are rendered and measured once, and a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUNS, TAKE
from torch import Tensor

from s2dm.cli.options import add_sampling, sampling_entries
from s2dm.data import DataConfig, build_dataset
from s2dm.evaluation.distances import bootstrap, frechet_distance, interval
from s2dm.evaluation.modes import Variant
from s2dm.evaluation.report import take_groups
from s2dm.evaluation.run import EvaluationConfig, evaluate, shuffled
from s2dm.evaluation.store import stored_frames
from s2dm.evaluation.tables import mean_over_seeds
from s2dm.files import write_json
from s2dm.flow import flow_to_image
from s2dm.models import load_checkpoint, read_config
from s2dm.training.run_folder import training_of
from s2dm.video import write_contact_sheet

SHEET_CLIPS = 4
FEWER_CLIPS = (128, 256)
# What makes two figures comparable.
COMMON = ("data", "clips", "frames", "size", "value_range", "features")


@dataclass(frozen=True)
class Row:
    """A row of a table: what is evaluated."""

    checkpoint: Path
    variant: Variant


@dataclass(frozen=True)
class Compared:
    """The rows that `compare` evaluated, and those that `add_row` added.

    protocol: of what was evaluated here, the checkpoints by the names of their rows.
    table: by name, what `summarise` made of each; of those evaluated here also `fvd_by_clips`, of
        the first of the clips, and `fvd_extrapolated` (see `extrapolated`).
    notes: what `s2dm evaluate` remarks.
    real: features (clips,400) of the true clips.
    generated: features (clips,seeds,400) of each row, by name, where they are known.
    groups: which clips are takes of one combination, a number for each.
    data: whose clips they are.
    folders: where the clips of each row are stored, by name.
    protocols: of each row that was added, by name.
    """

    protocol: dict[str, Any]
    table: dict[str, dict[str, Any]]
    notes: list[str]
    real: Tensor
    generated: dict[str, Tensor]
    groups: list[int]
    data: DataConfig
    folders: dict[str, Path]
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ratios(self, *over: str, samples: int) -> dict[str, dict[str, dict[str, Any]]]:
        """The FVD of each row over that of each of the rows `over`, with its 95 % interval.

        The same clips are drawn for all rows, and for the true ones: what is hard about a clip is
        hard for every row. All takes of a combination are drawn together. A row whose features are
        unknown has no ratio.

        Returns:
            By the name of the row below the line, then of that above it: `ratio`, `ratio_95`.
        """
        values = bootstrap(
            _fvds,
            self.real,
            *self.generated.values(),
            samples=samples,
            paired=True,
            groups=self.groups,
        )
        drawn = dict(zip(self.generated, values.unbind(1), strict=True))
        return {
            below: {
                name: {
                    "ratio": self.table[name]["fvd"] / self.table[below]["fvd"],
                    "ratio_95": list(interval(drawn[name] / drawn[below])),
                }
                for name in drawn
                if name != below
            }
            for below in over
        }


def _fvds(real: Tensor, *rows: Tensor) -> list[float]:
    return [mean_over_seeds(frechet_distance, real, row) for row in rows]


def extrapolated(real: Tensor, generated: Tensor) -> dict[str, Any]:
    """FVD of fewer clips, and of how many there will never be.

    Its bias is nearly proportional to 1/N as long as N is not much below the number of features:
    so a line through the figures of the two largest N, at 1/N = 0. They have to be well apart, or
    their small errors decide.

    Args:
        real: features (N,400).
        generated: features (N,seeds,400).
    """
    sizes = [*(size for size in FEWER_CLIPS if 2 * size <= len(real)), len(real)]
    figures = [mean_over_seeds(frechet_distance, real[:n], generated[:n]) for n in sizes]
    found = {"fvd_by_clips": dict(zip(map(str, sizes), figures, strict=True))}
    if len(sizes) > 1:
        (few, fewer), (many, more) = zip(sizes[-2:], figures[-2:], strict=True)
        found["fvd_extrapolated"] = (many * more - few * fewer) / (many - few)
    return found


@dataclass(frozen=True)
class Check:
    """What a table must show, in words, and whether it does.

    met: None for what was not measured.
    entry: the ratio that decides, with its interval, and the limit.
    """

    text: str
    met: bool | None
    entry: tuple[Mapping[str, Any], float] | None = None

    def __str__(self) -> str:
        outcome = {True: "met", False: "**missed**", None: "**not measured**"}[self.met]
        if self.entry is not None:
            ratio, limit = self.entry
            low, high = ratio["ratio_95"]
            if low <= limit <= high:
                outcome += f" (the interval contains the limit, {limit:g})"
        return f"{self.text}, {outcome}."


def ratio_text(entry: Mapping[str, Any]) -> str:
    low, high = entry["ratio_95"]
    return f"{entry['ratio']:.2f} ({low:.2f} to {high:.2f})"


def add_options(parser: argparse.ArgumentParser, seeds: Sequence[int]) -> None:
    """The options of every comparison: which clips, how they are sampled, where."""
    parser.add_argument("--clips", type=int, default=0, help="how many (all of the takes)")
    parser.add_argument("--takes", type=int, default=8, help="of each held-out combination")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="of the noise")
    add_sampling(parser)
    parser.set_defaults(steps=10, guidance=1.0, frames=0)
    parser.add_argument("--samples", type=int, default=200, help="of the bootstrap of ratios")
    parser.add_argument("--i3d", type=Path, required=True, help="weights of I3D")
    parser.add_argument("--half", action="store_true", help="compute in half precision")
    parser.add_argument("--chunk", type=int, default=8, help="frames computed at a time")
    parser.add_argument("--cpu", action="store_true")


def compare(rows: Mapping[str, Row], options: argparse.Namespace, run: str) -> Compared | None:
    """Evaluate the rows, or go on with it; None in other processes than the main one.

    Args:
        rows: by name.
        options: of `add_options`.
        run: folder in `runs/benchmarks` that keeps the clips.
    """
    by_checkpoint: dict[Path, list[str]] = {}
    for name, row in rows.items():
        by_checkpoint.setdefault(row.checkpoint, []).append(name)
    checkpoints, table, notes, generated, folders, real = [], {}, [], {}, {}, None
    for checkpoint, names in by_checkpoint.items():
        config = _config(checkpoint, [rows[name].variant for name in names], options, RUNS / run)
        result = evaluate(config)
        if result is None:
            continue
        with np.load(config.output / "features.npz") as stored:
            real = torch.from_numpy(stored["true"])[:, 0]
            for name in names:
                key = str(rows[name].variant)
                table[name] = result["table"][key]
                generated[name] = torch.from_numpy(stored[key])
                folders[name] = config.output / result["clips"][key]
        checkpoints.append(f"{', '.join(names)}: {result['protocol']['checkpoint']}")
        notes += result["notes"]
        protocol = result["protocol"]
    if real is None:
        return None
    count = len(build_dataset(config.data, config.data.validation_split))
    chosen = shuffled(count)[: options.clips or None]
    return Compared(
        protocol={**protocol, "checkpoint": "; ".join(checkpoints)},
        table={name: {**table[name], **extrapolated(real, generated[name])} for name in rows},
        notes=list(dict.fromkeys(notes)),
        real=real,
        generated={name: generated[name] for name in rows},
        groups=take_groups(chosen, count, options.takes),
        data=config.data,
        folders={name: folders[name] for name in rows},
    )


def _config(
    checkpoint: Path, variants: Sequence[Variant], options: argparse.Namespace, output: Path
) -> EvaluationConfig:
    return EvaluationConfig(
        checkpoint=checkpoint,
        output=output,
        data=_data(checkpoint, options),
        clips=options.clips,
        variants=tuple(variants),
        seeds=tuple(options.seeds),
        sampling=sampling_entries(options),
        method=None,  # how well flow is followed is another benchmark's, and would take as long
        i3d=options.i3d,
        chunk_size=options.chunk,
        half=options.half,
        cpu=options.cpu,
    )


def _data(checkpoint: Path, options: argparse.Namespace) -> DataConfig:
    trained = read_config(checkpoint)
    return DataConfig(
        size=trained.resolution[0],
        frames=options.frames or trained.frames,
        takes=options.takes,
        options={"first_take": TAKE},
    )


# ------------------------------------------------------------------------ rows from elsewhere


def add_row(found: Compared, text: str) -> Compared:
    """With the row "NAME=FILE", the `results.json` of an evaluation with one generated row.

    "NAME=FILE#ROW" chooses a row where there are several. Where `features.npz` lies beside the
    file, the row has ratios, too, and its true clips are compared with ours. Where its clips do,
    they are on the sheet.

    Raises:
        ValueError: not such a text or file, no FVD in it, another protocol, or other true clips.
    """
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise ValueError(f"A row is written NAME=FILE or NAME=FILE#ROW, got {text!r}.")
    file, _, key = place.partition("#")
    result = json.loads(Path(file).read_text("utf-8"))
    if not {"protocol", "table"} <= set(result):
        raise ValueError(f"{file} is no result of an evaluation: it has no protocol and table.")
    rows = {k: row for k, row in result["table"].items() if "fvd" in row}
    if not key and len(rows) == 1:
        key = next(iter(rows))
    if key not in rows:
        known = ", ".join(rows) or "none: evaluate with --i3d"
        raise ValueError(f"{file}: choose the row of {name} as {name}={file}#ROW. Rows: {known}.")
    for entry in COMMON:
        ours, theirs = found.protocol.get(entry), result["protocol"].get(entry)
        if ours != theirs:
            raise ValueError(
                f"{name} was evaluated under another protocol: its {entry.replace('_', ' ')} is "
                f"{theirs!r}, here it is {ours!r}. Evaluate it on the same clips."
            )
    features = Path(file).with_name("features.npz")
    generated = {}
    if features.exists():
        with np.load(features) as stored:
            true, generated[name] = stored["true"][:, 0], torch.from_numpy(stored[key])
        if true.shape != found.real.shape or not np.allclose(true, found.real, atol=1e-3):
            raise ValueError(
                f"{name} was compared with other true clips: their features in {features} are not "
                "those found here. Evaluate it again on the clips of this version."
            )
    folder = Path(file).parent / result.get("clips", {}).get(key, "none")
    folders = {name: folder} if folder.is_dir() else {}
    return dataclasses.replace(
        found,
        table={**found.table, name: rows[key]},
        generated={**found.generated, **generated},
        folders={**found.folders, **folders},
        protocols={**found.protocols, name: result["protocol"]},
    )


# --------------------------------------------------------------------------------- trainings


# Settings of a training run that change nothing of what is learnt.
_WHERE = {"output", "cache", "threads", "workers", "export_only", "log_every"}
_WHERE |= {"sample_every_minutes", "save_every_minutes"}


def check_trainings(first: Path, second: Path, setting: str, values: tuple[str, str]) -> str:
    """Make sure that two checkpoints of stage 2 differ in nothing but one setting.

    Compared are their configurations, VAE and text encoder, and, where the files of the training
    runs lie beside them, all settings and the steps trained.

    Args:
        first, second: the checkpoints.
        setting: "noise_sharing" or "fusion".
        values: what it has to be in the one and in the other.

    Returns:
        What is known of the trainings, for the protocol.

    Raises:
        ValueError: a setting is not what it has to be, or something else differs.
    """
    names = f"{first} and {second}"
    one, other = (read_config(path) for path in (first, second))
    parts = [load_checkpoint(path, ["vae", "text_encoder"]) for path in (first, second)]
    for path, config, value in zip((first, second), (one, other), values, strict=True):
        found = config.flow_adapter.fusion if setting == "fusion" else config.noise_sharing
        if found != value:
            raise ValueError(f"{path}: expected {setting} = {value} in training, got {found}.")
    if setting == "fusion":
        adapter = dataclasses.replace(other.flow_adapter, fusion=values[0])
        other = dataclasses.replace(other, flow_adapter=adapter)
    else:
        other = dataclasses.replace(other, noise_sharing=values[0])
    if one != other:
        raise ValueError(f"{names} differ in more of their configuration than {setting}.")
    for part in ("vae", "text_encoder"):
        a, b = (checkpoint[part].state for checkpoint in parts)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            raise ValueError(f"{names} have different weights in their {part.replace('_', ' ')}.")
    runs = [training_of(path) for path in (first, second)]
    if None in runs:
        return "settings unknown: config.json and log.jsonl of the runs are not beside the files"
    (settings, steps), (others, other_steps) = runs
    different = {key for key in settings | others if settings.get(key) != others.get(key)}
    different -= _WHERE | {setting}
    if different:
        raise ValueError(f"The trainings of {names} differ in {', '.join(sorted(different))}.")
    if steps != other_steps:
        raise ValueError(f"{names} were trained for {steps} and for {other_steps} steps.")
    return (
        f"{steps} steps of {settings['clips']} clips with {settings['clip_frames']} frames, seed "
        f"{settings['seed']}, on latents of {one.vae.latent_channels} channels; the runs differ in "
        f"{setting} alone"
    )


# ------------------------------------------------------------------------------------- files


def write_result(
    result: Mapping[str, Any],
    found: Compared,
    titles: Mapping[str, str],
    options: argparse.Namespace,
) -> None:
    """Write a benchmark's figures to `options.output`, with a sheet of clips beside them."""
    sheet = options.output.with_suffix(".jpg")
    _write_sheet(sheet, found, titles, options)
    write_json(options.output, {**result, "sheet": sheet.name})
    print(f"\n{options.output}\n{sheet}")


def _write_sheet(
    path: Path, found: Compared, titles: Mapping[str, str], options: argparse.Namespace
) -> None:
    """The first clips of the evaluation: true frames, flow, and what each row made of them."""
    clips = build_dataset(found.data, found.data.validation_split)
    pictures, labels = [], []
    for index in shuffled(len(clips))[: options.clips or None][:SHEET_CLIPS]:
        clip = clips[index]
        pictures += [clip.pixels, flow_to_image(clip.flow)]
        labels += [clip.caption, "its flow"]
        for name, folder in found.folders.items():
            pictures.append(stored_frames(folder, index, options.seeds[0]))
            labels.append(titles.get(name, name))
    write_contact_sheet(path, pictures, labels)
