"""Run the bundled flow-to-video workflow in a real ComfyUI and show what came of it.

    python tools/demo.py COMFYUI [--output FOLDER]

Starts a server without a window and with folders of its own, queues the workflow with a progress
bar, stops the server and prints where the video and a contact sheet lie. On the CPU where there
is no CUDA or MPS device.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfyui_graph import to_prompt
from comfyui_install import PACK, prepare_base
from comfyui_server import ComfyServer
from tqdm import tqdm

sys.path.append(str(PACK))

from s2dm.video import read_clip, read_image, write_contact_sheet

WORKFLOW = PACK / "workflows" / "s2dm_flow_to_video.json"
CLIP = PACK / "workflows" / "s2dm_example.mp4"
RESULT = "flow_to_video"  # file name prefix in the workflow
PANELS = ("given clip", "its motion", "new video")


class Progress:
    """Websocket messages of one prompt as a bar for each node that reports steps."""

    def __init__(self, prompt: Mapping[str, Any]) -> None:
        self.titles = {node: entry["_meta"]["title"] for node, entry in prompt.items()}
        self.node: str | None = None
        self.bar: tqdm | None = None

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "executing" or kind.startswith("execution_"):
            self.close()
        elif kind == "progress":
            if self.bar is None or data["node"] != self.node:
                self.close()
                self.node = data["node"]
                self.bar = tqdm(
                    total=data["max"],
                    desc=self.titles.get(self.node, self.node),
                    mininterval=0.1 if sys.stderr.isatty() else 10,  # a log needs few lines
                )
            self.bar.update(data["value"] - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def device_arguments() -> list[str]:
    """`--cpu` where this torch sees no accelerator that ComfyUI uses."""
    return [] if torch.cuda.is_available() or torch.backends.mps.is_available() else ["--cpu"]


def threads() -> int:
    """OMP_NUM_THREADS if set, else half the cores: OpenMP with a thread for each core becomes many
    times slower when anything else runs beside it."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // 2))


def pick(files: list[Path], prefix: str) -> Path:
    """The one video whose name starts with `prefix`."""
    (found,) = (file for file in files if file.name.startswith(prefix) and file.suffix == ".mp4")
    return found


def shown(files: list[Path]) -> torch.Tensor:
    """The pictures that nodes showed without saving them, in their order, (N, 3, H, W)."""
    return torch.stack([read_image(file) for file in files if file.parent.name == "temp"])


def contact_sheet(files: list[Path], path: Path) -> Path:
    """Lay out the given clip, its motion and the new video of a run, one row each."""
    video, _ = read_clip(pick(files, RESULT))
    given, _ = read_clip(CLIP)
    write_contact_sheet(path, [given[: len(video)], shown(files), video], PANELS, columns=8)
    return path


def run(comfyui: Path, workflow: Path, folder: Path) -> list[Path]:
    """Run a workflow of the pack in a server of its own below `folder`; the files it wrote."""
    arguments = device_arguments()
    print(f"Starting ComfyUI{' on the CPU' if arguments else ''} ...", flush=True)
    with ComfyServer(comfyui, prepare_base(folder), arguments, threads=threads()) as server:
        prompt = to_prompt(json.loads(workflow.read_text("utf-8")), server.object_info())
        print(f"Running {workflow.name} ...", flush=True)
        return server.files(server.run(prompt, timeout=1800, on_event=Progress(prompt)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument("--output", type=Path, default=PACK / "output" / "demo")
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="s2dm-demo-", ignore_cleanup_errors=True) as folder:
        files = run(arguments.comfyui, WORKFLOW, Path(folder))
        video = Path(shutil.copy(pick(files, RESULT), arguments.output / "video.mp4"))
        sheet = contact_sheet(files, arguments.output / "contact_sheet.png")
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(f"Video:         {video.resolve()}")
    print(f"Contact sheet: {sheet.resolve()}")


if __name__ == "__main__":
    main()
