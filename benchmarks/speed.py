"""Time and peak memory of sampling: 16 and 128 frames, in chunks and whole.

Each case runs in a process of its own, so that peaks don't mix. Memory is the highest resident
set of that process during sampling, and how much of it sampling added to what was resident when
the model and the flow had been loaded.

    python benchmarks/speed.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import RESULTS, show

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.files import write_json

TARGET = 1.15  # peak of 128 frames over that of 16 with the same chunk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=4, help="memory doesn't depend on it")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="the median is reported")
    parser.add_argument("--case", nargs=2, type=int, metavar=("FRAMES", "CHUNK"), help="internal")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_measure(options, *options.case)))
        return

    cases = [(16, options.chunk), (128, options.chunk), (16, 16), (128, 128)]
    card = ProtocolCard(
        checkpoint=f"{options.checkpoint.name} ({file_hash(options.checkpoint)})",
        size=(options.size, options.size),
        notes={
            "sampling": f"DDIM, {options.steps} steps, guidance 7.5, float32, CPU, no decoding",
            "memory": "resident set of the process; `added` since model and flow were loaded",
            "repeats": f"{options.repeats} process(es) a case, the median",
        },
    )
    show("Speed and memory of sampling", card)
    rows = []
    for frames, chunk in cases:
        runs = sorted(
            (_in_own_process(options, frames, chunk) for _ in range(options.repeats)),
            key=lambda run: run["peak_mib"],
        )
        rows.append(runs[len(runs) // 2])
        print(_line(rows[-1]), flush=True)
    peak = rows[1]["peak_mib"] / rows[0]["peak_mib"]
    print(f"\npeak memory, 128 frames over 16 in chunks of {options.chunk}: {peak:.3f}")
    print(f"target: at most {TARGET}: {'met' if peak <= TARGET else 'MISSED'}")
    write_json(
        RESULTS / "speed.json", {"protocol": card.to_dict(), "rows": rows, "peak_ratio": peak}
    )


def _in_own_process(options: argparse.Namespace, frames: int, chunk: int) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--case", str(frames), str(chunk)]
    arguments += ["--checkpoint", str(options.checkpoint), "--size", str(options.size)]
    arguments += ["--steps", str(options.steps)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(options: argparse.Namespace, frames: int, chunk: int) -> dict[str, float]:
    import torch

    from s2dm.flow import FlowField
    from s2dm.pipelines import FlowToVideoPipeline

    pipeline = FlowToVideoPipeline.from_single_file(options.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    flow = FlowField.zeros(frames, options.size, options.size)
    run = {"seed": 0, "chunk_size": chunk, "output_type": "latent"}
    # The first call loads code and kernels, which belongs to no number of frames.
    guidance = {"guidance_scale": 7.5, "flow_guidance_scale": 7.5}
    still = FlowField.zeros(1, options.size, options.size)
    pipeline("A man", still, sampling=guidance | {"steps": 1}, **run)
    with PeakMemory() as memory:
        start = time.perf_counter()
        with torch.inference_mode():
            pipeline("A man", flow, sampling=guidance | {"steps": options.steps}, **run)
        seconds = time.perf_counter() - start
    return {
        "frames": frames,
        "chunk": chunk,
        "seconds_per_frame_and_step": seconds / frames / options.steps,
        "peak_mib": memory.peak / 2**20,
        "added_mib": (memory.peak - memory.before) / 2**20,
    }


class PeakMemory:
    """The highest resident set of this process in a `with` block, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
        import psutil

        self._process = psutil.Process()
        self.before = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def _line(row: dict[str, float]) -> str:
    return (
        f"{row['frames']:4d} frames, {row['chunk']:3d} at a time: "
        f"{1000 * row['seconds_per_frame_and_step']:6.1f} ms a frame and step, "
        f"peak {row['peak_mib']:6.0f} MiB, added {row['added_mib']:6.0f} MiB"
    )


if __name__ == "__main__":
    main()
