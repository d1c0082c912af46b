"""Time and memory of drawing motion: ten layers on 512x512, for 27 and for 81 frames.

Of the ten layers four move as one, three bend, and three have no region. They are drawn before a
camera that stands still, before one that pans, zooms and rolls, and before that one with parallax.
Each case runs in a process of its own, so that peaks don't mix. Memory is what drawing added to
the resident set, the flow itself and the node's mask among it.

    python benchmarks/drawing.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from common import RESULTS, show
from speed import PeakMemory

from s2dm.evaluation.protocol import ProtocolCard
from s2dm.files import write_json
from s2dm.flow.draw import CameraKey, Layer, Motion, Polygon, render

SIZE, FRAMES, FEWER_FRAMES = 512, 81, 27
TARGET = 3.0  # seconds by the clock, for ten layers before a camera that stands still
TARGET_GROWTH = 1.1  # memory that a frame more takes, over that of its flow
CAMERAS = {
    "still": "stands still",
    "moving": "pans, zooms and rolls",
    "parallax": "the same, with parallax",
}


def ten_layers(camera: str) -> Motion:
    """Four rigid limbs, three that bend and three tracks without a region, all over the picture."""
    layers = []
    for number in range(10):
        x, y = 100.0 + 150 * (number % 3), 90.0 + 100 * (number // 3)
        path = _path([(x, y), (x + 40, y - 20), (x + 60, y + 30)])
        if number % 3 == 2:
            layers.append(Layer(tracks=(path,), radius=32))
            continue
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        corners = np.stack([x + 70 * np.cos(angle), y + 50 * np.sin(angle)], axis=1)
        free = number % 3 == 1
        tracks = (path, _path([(x - 50, y), (x - 45, y + 20)])) if free else (path,)
        pins = np.array([[x, y + 45]])
        move = "free" if free else "rigid"
        layers.append(Layer(region=Polygon(corners), tracks=tracks, pins=pins, move=move))
    keys = () if camera == "still" else (CameraKey(1.0, 40, -20, 1.2, 10),)
    return Motion(SIZE, SIZE, tuple(layers), camera=keys)


def _path(points: list[tuple[float, float]]) -> np.ndarray:
    return np.column_stack([np.array(points), np.linspace(0, 1, len(points))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", nargs=2, metavar=("CAMERA", "FRAMES"), help="internal")
    options = parser.parse_args()
    if options.case:
        torch.set_num_threads(options.threads)
        print(json.dumps(_measure(options.case[0], int(options.case[1]), options.repeats)))
        return

    card = ProtocolCard(
        size=(SIZE, SIZE),
        notes={
            "layers": "4 rigid, 3 bent, 3 without a region",
            "time": f"median of {options.repeats} runs in one process, the first one not counted; "
            "by the clock, and of the processor, all threads together",
            "memory": "what drawing adds to the resident set of a process, at its peak",
            "threads of the drawing": f"{options.threads}",
            "load of the machine": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors",
        },
    )
    show("Drawing of ten layers", card)
    rows = []
    for camera in CAMERAS:
        for frames in (FEWER_FRAMES, FRAMES):
            rows.append(_in_own_process(options, camera, frames))
            print(_line(rows[-1]), flush=True)
    write_json(RESULTS / "drawing.json", {"protocol": card.to_dict(), "rows": rows})


def flow_mib(row: dict[str, Any]) -> float:
    """What the flow of a row takes, and where layers lie: 13 bytes a pixel and frame."""
    return 13 * SIZE * SIZE * row["frames"] / 2**20


def growth(few: dict[str, Any], many: dict[str, Any]) -> float:
    """What each frame more of two rows added, over what its flow takes."""
    return (many["added_mib"] - few["added_mib"]) / (flow_mib(many) - flow_mib(few))


def _in_own_process(options: argparse.Namespace, camera: str, frames: int) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--case", camera, str(frames)]
    arguments += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(camera: str, frames: int, repeats: int) -> dict[str, Any]:
    motion = ten_layers(camera)
    depth = None
    if camera == "parallax":
        depth = torch.linspace(0, 1, SIZE).view(1, 1, SIZE, 1).expand(1, 1, SIZE, SIZE)
    render(motion, 2, depth)  # loads code, which belongs to no number of frames
    with PeakMemory() as memory:
        render(motion, frames, depth)
    seconds, processor = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        render(motion, frames, depth)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    return {
        "camera": camera,
        "frames": frames,
        "threads": torch.get_num_threads(),
        "seconds": statistics.median(seconds),
        "processor_seconds": statistics.median(processor),
        "added_mib": (memory.peak - memory.before) / 2**20,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"camera {CAMERAS[row['camera']]}, {row['frames']} frames: {row['seconds']:.2f} s "
        f"(processor {row['processor_seconds']:.2f} s), {row['added_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
