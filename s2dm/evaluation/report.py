"""What an evaluation found: its table, its protocol, its plots and its sheet of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import replacing, write_json, write_text
from ..flow import flow_to_image
from ..video import write_contact_sheet
from .clip_metrics import MOVING
from .distances import sample_size_problem
from .modes import TRUE
from .protocol import ProtocolCard, hardware
from .store import read_code, read_frames, read_totals
from .tables import markdown_table, save_plots, summarise

if TYPE_CHECKING:
    from .run import Run


def write_report(run: Run) -> dict[str, Any]:
    """Put all clips of a finished run together and write what there is to see.

    Returns:
        What is in `results.json`, see `evaluate`.
    """
    config, features, notes = run.config, run.features(), []
    if not features:
        notes.append("FVD and KVD are left out: they need the weights of I3D (--i3d FILE).")
    real = features[str(TRUE)][:, 0] if features else None
    table = {}
    groups = take_groups(run.chosen, len(run.data), config.data.takes)
    for variant in config.variants:
        totals = [
            read_totals([run.path(task) for task in run.tasks(variant, [index])])
            for index in run.chosen
        ]
        generated = None if variant == TRUE else features.get(str(variant))
        if generated is not None:
            notes.append(sample_size_problem(real, generated))
        table[str(variant)] = summarise(totals, real, generated, groups)
    notes = [note for note in dict.fromkeys(notes) if note]
    card = _card(run)
    folders = {str(variant): run.folder(variant) for variant in config.variants}
    result = {"protocol": card.to_dict(), "table": table, "notes": notes, "clips": folders}
    titles = {str(variant): variant.title for variant in config.variants}
    write_json(config.output / "results.json", result)
    if features:
        with replacing(config.output / "features.npz") as temporary:
            np.savez(temporary, **{name: rows.numpy() for name, rows in features.items()})
    save_plots(config.output / "plots.png", table, titles)
    _write_sheet(run, config.output / "sheet.jpg")
    page = ["# Evaluation", markdown_table(table, titles), *notes, card.to_markdown()]
    page += ["![Figures with their 95 % intervals](plots.png)", "![Clips](sheet.jpg)"]
    write_text(config.output / "results.md", "\n\n".join(page) + "\n")
    return result


def take_groups(indices: Sequence[int], count: int, takes: int) -> list[int]:
    """Which clips are takes of one combination, and alike therefore: a number for each.

    Of the clips `indices` of a data set of `count`, where clip i is a take of combination i modulo
    the number of combinations.
    """
    return [index % (count // takes) for index in indices]


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
    return ProtocolCard(
        checkpoint=f"{config.checkpoint.name} ({run.weights})",
        features=run.i3d and f"{run.i3d.description}; {run.i3d.preprocessing}",
        clips=len(run.chosen),
        data=f"{data.name}, {data.validation_split} split, the first of {len(run.data)} clips "
        f"in an order shuffled with seed 0{options}",
        frames=data.frames,
        size=(data.size, data.size),
        value_range=(0.0, 1.0),
        seeds=config.seeds,
        notes={
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
                rows.append(read_frames(run.path(run.tasks(variant, [index])[0])))
                labels.append(variant.title)
    if rows:
        write_contact_sheet(path, rows, labels)
