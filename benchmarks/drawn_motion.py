"""Does a clip follow motion that was drawn by hand on a picture?

Twelve motions, in `drawn_motions.json` as the editor writes them, were drawn on the first frames of
twelve clips of the puppets' test split: ten of a person (arms, heads and a leg, a lean, a step
aside), and two with a camera, which are reported apart.
The picture and the flow of the drawing go into the bundled model, which is anchored to the picture
as the checkpoint recommends; its flow is compared with that of the drawing. Beside it, in the same
units, the picture warped by the flow and its holes filled: the error of the estimator itself.

    python benchmarks/drawn_motion.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, TAKE, show
from tqdm import tqdm

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.cli.options import add_sampling, sampling_entries
from s2dm.data.puppets import PuppetClips
from s2dm.evaluation.clip_metrics import (
    MOVING,
    Total,
    flicker,
    flow_error,
    motion_magnitude,
    moving_region,
    still_region,
    warp_error,
)
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.evaluation.run import shuffled
from s2dm.evaluation.tables import summarise
from s2dm.files import write_json
from s2dm.flow import FlowField, estimate_flow, flow_to_image
from s2dm.flow.draw import read_motion, render
from s2dm.flow.warp import visibility, warp_picture
from s2dm.models import read_config
from s2dm.pipelines import FlowToVideoPipeline
from s2dm.video import write_contact_sheet

MOTIONS = Path(__file__).with_name("drawn_motions.json")
FRAMES = 16
TARGET = 0.4  # flow error over motion
CAMERA = ", before a camera that moves"
WAYS = {"generated": "generated", "warped": "the picture warped, holes filled"}
TITLES = {way + camera: title + camera for camera in ("", CAMERA) for way, title in WAYS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--motions", type=Path, default=MOTIONS)
    add_sampling(parser)
    parser.add_argument("--output", type=Path, default=RESULTS / "drawn_motion.json")
    options = parser.parse_args()

    sampling = read_config(options.checkpoint).sampling.replacing(sampling_entries(options))
    motions = json.loads(options.motions.read_text("utf-8"))
    card = ProtocolCard(
        checkpoint=f"{options.checkpoint.name} ({file_hash(options.checkpoint)})",
        clips=len(motions),
        data="drawn on the first frames of the puppets' test split, the first clips in an order "
        f"shuffled with seed 0, first_take {TAKE}",
        frames=FRAMES,
        size=(128, 128),
        value_range=(0.0, 1.0),
        notes={
            "motions": f"{options.motions.name} ({file_hash(options.motions)})",
            "noise": "of motion k drawn with seed k",
            "sampling": f"{sampling}, float32; anchored to the picture that was drawn on",
            "flow error": "end-point error between drawn flow and dis flow of the clip, where the "
            f"drawn flow is longer than {MOVING:g} pixel and not occluded, over its mean length "
            "there",
            "flicker": "standard deviation over time of what the drawn flow never moves, 8 pixels "
            "away from all it does, of 255",
            "warp error": "mean |frame i - frame 1 warped by the drawn flow| where visible, of 255",
        },
    )
    show("Drawn motion", card)
    pipeline = FlowToVideoPipeline.from_single_file(options.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    data = PuppetClips("test", takes=1, first_take=TAKE)
    found: dict[str, list[dict[str, Total]]] = {name: [] for name in TITLES}
    rows, pictures, labels = [], [], []
    for seed, (index, drawn) in enumerate(zip(shuffled(len(data)), tqdm(motions), strict=False)):
        clip = data[index]
        picture = clip.pixels[:1]
        flow = render(read_motion(json.dumps(drawn["motion"]), 128, 128), FRAMES).flow
        made = {
            "generated": pipeline(
                clip.caption,
                flow,
                sampling=sampling.to_dict(),
                reference=picture[0],
                seed=seed,
                chunk_size=8,
                output_type="pt",
            ).frames,
            "warped": warp_picture(picture, flow, shown=visibility(flow)),
        }
        camera = CAMERA if drawn["motion"]["camera"] else ""
        measured = {way: measure(frames, flow) for way, frames in made.items()}
        for way, totals in measured.items():
            found[way + camera].append(totals)
        errors = {way: totals["flow_error"].figure for way, totals in measured.items()}
        rows.append({"title": drawn["title"], **errors})
        print(f"{drawn['title']}: {errors['generated']:.2f} (warped {errors['warped']:.2f})")
        pictures += [flow_to_image(flow), made["generated"]]
        labels += [f"{drawn['title']}: the drawn flow", "what the model makes of it"]
    table = {name: summarise(totals) for name, totals in found.items()}
    sheet = options.output.with_suffix(".jpg")
    write_contact_sheet(sheet, pictures, labels)
    write_json(
        options.output,
        {"protocol": card.to_dict(), "table": table, "motions": rows, "sheet": sheet.name},
    )
    print(f"{options.output}\n{sheet}")


def measure(frames: Any, flow: FlowField) -> dict[str, Total]:
    """The figures of a clip (N,3,H,W) that was given a drawn flow."""
    realised, moving = estimate_flow(frames), moving_region(flow)
    return {
        "flow_error": flow_error(realised, flow),
        "motion": motion_magnitude(realised, moving),
        "given_motion": motion_magnitude(flow, moving),
        "flicker": flicker(frames, still_region(flow)),
        "warp_error": warp_error(frames, flow),
    }


if __name__ == "__main__":
    main()
