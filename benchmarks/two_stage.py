"""Text to video in two stages: twelve prompts, the stillness of their backgrounds, the time.

Prompt k is drawn with seed k from the person x action combinations that training never saw, and
its clip starts from noise of seed k: nothing is selected.

    python benchmarks/two_stage.py
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, RUNS, show
from tqdm import tqdm

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.cli.options import add_sampling, sampling_entries
from s2dm.data.puppets import caption, split
from s2dm.evaluation.clip_metrics import STILL, flicker, pooled_figure, still_region
from s2dm.evaluation.distances import bootstrap_interval
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.files import write_json
from s2dm.flow import FlowField, flow_to_image
from s2dm.models import FlowSampling, read_config
from s2dm.pipelines import TextToVideoPipeline
from s2dm.video import write_contact_sheet

PROMPTS = 12
TARGET_SHARE = 1 / 3
GIVEN_FLOW = RESULTS / "flow_following.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    add_sampling(parser)
    parser.add_argument("--flow-steps", type=int, default=20)
    parser.add_argument("--flow-text-guidance", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3, help="of the timing, the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS / "two_stage.json")
    options = parser.parse_args()

    trained = read_config(options.checkpoint)
    sampling = trained.sampling.replacing(sampling_entries(options))
    flow_sampling = FlowSampling(options.flow_steps, options.flow_text_guidance)
    settings = {"sampling": sampling, "flow_sampling": flow_sampling}
    prompts = [caption(*random.Random(seed).choice(split("test"))) for seed in range(PROMPTS)]
    weights = file_hash(options.checkpoint)
    card = ProtocolCard(
        checkpoint=f"{options.checkpoint.name} ({weights})",
        clips=PROMPTS,
        data="prompts of the puppets' held-out person x action combinations, number k drawn with "
        "seed k",
        frames=trained.frames,
        size=trained.resolution,
        seeds=list(range(PROMPTS)),
        notes={
            "sampling": f"stage 2 {sampling}; stage 1 DPM-Solver++ 2M, {flow_sampling.steps} "
            f"steps, guidance {flow_sampling.guidance_scale:g}; float32",
            "still": f"standard deviation over time, of 255, of pixels that the generated flow "
            f"moves by less than {STILL:g} pixels in every frame, 8 pixels away "
            "from all others",
            "time": f"from the prompt to decoded frames, the median of {options.repeats} runs",
        },
    )
    show("Text to video in two stages", card)
    key = json.dumps([weights, *map(dataclasses.asdict, settings.values()), card.code])
    store = RUNS / "two_stage" / hashlib.sha256(key.encode()).hexdigest()[:12]
    pipeline = TextToVideoPipeline.from_single_file(options.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    made = [
        _clip(pipeline, prompt, seed, settings, store)
        for seed, prompt in enumerate(tqdm(prompts, unit="clip"))
    ]
    totals = [flicker(clip["frames"], still_region(clip["flow"])) for clip in made]
    table = {
        "still": pooled_figure(totals),
        "still_95": bootstrap_interval(pooled_figure, totals, samples=1000),
        "equal": max(_first_frame_difference(clip) for clip in made),
        "seconds": _timing(pipeline, prompts[0], settings, options.repeats),
    }
    sheet = options.output.with_suffix(".jpg")
    result = {"protocol": card.to_dict(), "table": table, "sheet": sheet.name}
    print(markdown(result))
    _write_sheet(sheet, prompts, made)
    write_json(options.output, result)
    print(f"\n{options.output}\n{sheet}")


def _clip(
    pipeline: TextToVideoPipeline,
    prompt: str,
    seed: int,
    settings: dict[str, Any],
    store: Path,
) -> dict[str, Any]:
    """Frames (N,3,H,W), flow and reference frame of one prompt, kept in the run's folder."""
    path = store / f"{seed:02d}.pt"
    if not path.exists():
        made = pipeline(prompt, seed=seed, **settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        flow = (made.flow.displacement, made.flow.occlusion)
        torch.save({"frames": made.frames, "flow": flow, "reference": made.reference}, path)
    stored = torch.load(path, weights_only=True)
    return {**stored, "flow": FlowField(*stored["flow"])}


def _first_frame_difference(clip: dict[str, Any]) -> float:
    return (clip["frames"][0] - clip["reference"]).abs().max().item()


def _timing(
    pipeline: TextToVideoPipeline, prompt: str, settings: dict[str, Any], repeats: int
) -> dict[str, float]:
    """Median seconds of stage 1 and of the whole, at the settings of the clips."""
    runs = []
    for _ in range(repeats + 1):
        marks = [time.perf_counter()]
        pipeline(
            prompt,
            seed=0,
            callback_on_step_end=lambda step, state, marks=marks: marks.append(time.perf_counter()),
            **settings,
        )
        end = time.perf_counter()
        # The callbacks come after each step of the reference frame, then of the flow.
        first = settings["sampling"].steps
        last = first + settings["flow_sampling"].steps
        runs.append((marks[last] - marks[first], end - marks[0]))
    stage1, whole = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    return {"stage_1": stage1, "whole": whole}


def checks(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """What two stages must reach, in words, and whether they do."""
    table = result["table"]
    share = table["seconds"]["stage_1"] / table["seconds"]["whole"]
    found = [
        (
            f"Stage 1 takes at most a third of the time: {table['seconds']['stage_1']:.1f} of "
            f"{table['seconds']['whole']:.1f} s, {share:.0%}",
            share <= TARGET_SHARE,
        )
    ]
    given = json.loads(GIVEN_FLOW.read_text("utf-8")) if GIVEN_FLOW.exists() else None
    if given and given["protocol"]["checkpoint"] == result["protocol"]["checkpoint"]:
        given = given["table"]["given-flow"]["flicker"]
        limit = given + 1
        found.append(
            (
                f"Still background at most 1 of 255 above that with given flow ({given:.1f}): "
                f"{table['still']:.1f}",
                table["still"] <= limit,
            )
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The list of the results page."""
    table = result["table"]
    low, high = table["still_95"]
    return "\n".join(
        [
            f"- Still background: {table['still']:.1f} of 255 (95 %: {low:.1f} to {high:.1f}).",
            f"- Frame 1 and the reference frame differ by at most {table['equal']:.1e} of 1.",
            *(f"- {text}, {'met' if met else '**missed**'}." for text, met in checks(result)),
        ]
    )


def _write_sheet(path: Path, prompts: list[str], made: list[dict[str, Any]]) -> None:
    rows, labels = [], []
    for seed, (prompt, clip) in enumerate(zip(prompts, made, strict=True)):
        rows += [clip["frames"], flow_to_image(clip["flow"])]
        labels += [f"{seed}: {prompt}", "flow of stage 1"]
    write_contact_sheet(path, rows, labels)


if __name__ == "__main__":
    main()
