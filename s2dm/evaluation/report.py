"""What an evaluation found: its table, its protocol, its plots and its sheet of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..files import replacing, write_json, write_text
from ..flow import flow_to_image
from ..video import write_contact_sheet
from .clip_metrics import MOVING
from .distances import sample_size_problem
from .modes import TRUE
from .protocol import ProtocolCard, hardware
from .store import read_code, read_frames, read_totals
from .tables import by_label, label_table, markdown_table, save_plots, summarise

if TYPE_CHECKING:
    from ..data import ClipDataset
    from .run import Run


def write_report(run: Run) -> dict[str, Any]:
    """Put all clips of a finished run together and write what there is to see.

    Returns:
        What is in `results.json`, see `evaluate`.
    """
    config, features, notes = run.config, run.features(), []
    if not features:
        notes.append("FVD and KVD are left out: they need the weights of I3D (--i3d FILE).")
    real = torch.cat(features[str(TRUE)]) if features else None
    table = {}
    groups = combination_groups(run.data, run.chosen, config.data.takes)
    for variant in config.variants:
        totals = [
            read_totals([run.path(task) for task in run.tasks(variant, [index])])
            for index in run.chosen
        ]
        videos = None if variant == TRUE else features.get(str(variant))
        # Seeds are as many of every clip, and each is compared by itself; or all are, at once.
        pooled = bool(config.videos and variant.sampled)
        generated = videos if videos is None or pooled else torch.stack(videos)
        row = summarise(totals, real, generated, groups)
        if real is not None and videos is not None:
            counted = torch.cat(videos) if pooled else generated
            notes.append(sample_size_problem(real, counted))
            for kind, labels in _labels(run.data, run.chosen).items():
                if found := by_label(real, videos, labels):
                    row[f"fvd_by_{kind}"] = found
        table[str(variant)] = row
    notes = [note for note in dict.fromkeys(notes) if note]
    card = _card(run)
    folders = {str(variant): run.folder(variant) for variant in config.variants}
    result = {"protocol": card.to_dict(), "table": table, "notes": notes, "clips": folders}
    titles = {str(variant): variant.title for variant in config.variants}
    write_json(config.output / "results.json", result)
    if features:
        with replacing(config.output / "features.npz") as temporary:
            np.savez(temporary, **_arrays(run, features))
    save_plots(config.output / "plots.png", table, titles)
    _write_sheet(run, config.output / "sheet.jpg")
    page = ["# Evaluation", markdown_table(table, titles), label_table(table, titles)]
    page = [part for part in (*page, *notes, card.to_markdown()) if part]
    page += ["![Figures with their 95 % intervals](plots.png)", "![Clips](sheet.jpg)"]
    write_text(config.output / "results.md", "\n\n".join(page) + "\n")
    return result


def take_groups(indices: Sequence[int], count: int, takes: int) -> list[int]:
    """Which clips are takes of one combination, and alike therefore: a number for each.

    Of the clips `indices` of a data set of `count`, where clip i is a take of combination i modulo
    the number of combinations.
    """
    return [index % (count // takes) for index in indices]


def combination_groups(data: ClipDataset, indices: Sequence[int], takes: int) -> list[int]:
    """Clips of one person who does one thing are alike, too, where the data set tells them."""
    groups = take_groups(indices, len(data), takes)
    labels = [*zip(*_labels(data, indices).values(), strict=True)]
    if not labels:
        return groups
    first: dict[tuple[str, ...], int] = {}
    return [first.setdefault(label, group) for label, group in zip(labels, groups, strict=True)]


def _labels(data: ClipDataset, indices: Sequence[int]) -> dict[str, list[str]]:
    """Class and subject of each clip, where the data set knows them."""
    labels = getattr(data, "labels", None)
    if labels is None:
        return {}
    found = [labels(index) for index in indices]
    return {kind: [of_clip[kind] for of_clip in found] for kind in ("class", "subject")}


def _arrays(run: Run, features: dict[str, list[Tensor]]) -> dict[str, np.ndarray]:
    """What `features.npz` holds: (clips,seeds,400) by row; with videos (videos,400), and as
    `NAME/clip` (videos,) the number of each one's clip in the order of the true ones."""
    if not run.config.videos:
        return {name: torch.stack(rows).numpy() for name, rows in features.items()}
    arrays = {}
    for name, rows in features.items():
        arrays[name] = torch.cat(rows).numpy()
        arrays[f"{name}/clip"] = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return arrays


def _card(run: Run) -> ProtocolCard:
    config, data = run.config, run.config.data
    options = "".join(f", {name} {value}" for name, value in data.options.items())
    dtype = str(run.sampler.dtype).removeprefix("torch.")
    sampling = f"{run.sampling}, {dtype}"
    if any(variant.stage_1 for variant in config.variants):
        sampling += (
            f"; stage 1 DPM-Solver++ 2M, {config.flow_sampling.steps} steps, guidance "
            f"{config.flow_sampling.guidance_scale:g}"
        )
    flow_error = {}
    if config.method is not None:
        flow_error["flow error"] = (
            f"end-point error between given flow and {config.method} flow of the clip, where "
            f"the given flow is longer than {MOVING:g} pixel and not occluded, over its mean "
            "length there"
        )
    versions = {read_code(run.path(t)) for variant in config.variants for t in run.tasks(variant)}
    clips_code = {}
    if versions != {run.code}:
        clips_code["code of the clips"] = "; ".join(sorted(versions))
    videos = {}
    if config.videos:
        videos["videos"] = (
            f"{config.videos} generated in each row, each from a clip drawn with repetition (seed "
            "0), its r-th from seed r; FVD and KVD compare all at once with the true clips"
        )
    return ProtocolCard(
        checkpoint=f"{config.checkpoint.name} ({run.weights})",
        features=run.i3d and f"{run.i3d.description}; {run.i3d.preprocessing}",
        clips=len(run.chosen),
        data=f"{data.name}, {data.validation_split} split, the first of {len(run.data)} clips "
        f"in an order shuffled with seed 0{options}",
        frames=data.frames,
        size=(data.size, data.size),
        value_range=(0.0, 1.0),
        seeds=None if config.videos else config.seeds,
        notes={
            **videos,
            "noise": "of clip k drawn with 100000 seed + k",
            "sampling": sampling,
            **{variant.mode: variant.recipe for variant in config.variants if variant.recipe},
            "pixels": "measured as stored, in 8 bits",
            **flow_error,
            "flicker": "standard deviation over time of pixels that nothing passes, of 255",
            "warp error": "mean |frame i - frame 1 warped by the given flow| where visible, of 255",
            **clips_code,
        },
        code=run.code,
        hardware=hardware(run.state.device),
    )


def _write_sheet(run: Run, path: Path) -> None:
    rows, labels = [], []
    for index in run.chosen[: run.config.sheet_clips]:
        clip = run.data[index]
        rows += [clip.pixels, flow_to_image(clip.flow)]
        labels += [clip.caption, "its flow"]
        for variant in run.config.variants:
            if variant != TRUE:
                tasks = run.tasks(variant, [index])[:1]
                rows += [read_frames(run.path(task)) for task in tasks]
                labels += [variant.title] * len(tasks)
    if rows:
        write_contact_sheet(path, rows, labels)
