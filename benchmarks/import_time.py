"""How much importing the pack adds to the start of ComfyUI, and what the library imports.

Fresh processes import ComfyUI's own modules, and then the pack as ComfyUI does; the difference
is reported, as the median of several runs.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import RESULTS, ROOT, show

from s2dm.evaluation.protocol import ProtocolCard
from s2dm.files import write_json

TARGET = 0.5  # seconds
_PACK = """
import asyncio, importlib.util, sys, time
sys.path.insert(0, {comfyui!r})
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy.sd, comfy_api.latest
import comfy_extras.nodes_custom_sampler
start = time.perf_counter(), time.process_time()
spec = importlib.util.spec_from_file_location(
    "custom_nodes_s2dm", {pack!r} + "/__init__.py", submodule_search_locations=[{pack!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
async def schemas():
    extension = await module.comfy_entrypoint()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
asyncio.run(schemas())
print(time.perf_counter() - start[0], time.process_time() - start[1])
forbidden = {{"diffusers", "accelerate", "matplotlib", "cv2"}} & set(sys.modules)
print(",".join(sorted(forbidden)))
"""
_LIBRARY = """
import sys, time
sys.path.insert(0, {pack!r})
import torch
start = time.perf_counter(), time.process_time()
import s2dm, s2dm.flow, s2dm.sector, s2dm.models
print(time.perf_counter() - start[0], time.process_time() - start[1])
print(",".join(sorted({{"comfy", "folder_paths", "diffusers", "transformers"}} & set(sys.modules))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    card = ProtocolCard(
        notes={
            "pack": "import of the pack, its nodes and their schemas in a process that has "
            "imported ComfyUI's core",
            "library": "import of s2dm.flow, s2dm.sector and s2dm.models after torch",
            "runs": f"{options.runs}, the first one not counted, median (smallest to largest)",
        },
    )
    show("Import time", card)
    cases = {"library": (_LIBRARY, [])}
    if options.comfyui:
        cases["pack"] = (_PACK, options.comfyui)
    else:
        print("COMFYUI_PATH is not set: the pack itself is not measured.")
    result = {"protocol": card.to_dict()}
    for name, (code, comfyui) in cases.items():
        code = code.format(comfyui=str(comfyui), pack=str(ROOT))
        seconds, processor, unwanted = _run(code, options.runs)
        result[name] = {
            "median_s": statistics.median(seconds),
            "range_s": [min(seconds), max(seconds)],
            "processor_s": statistics.median(processor),
            "unwanted_modules": unwanted,
        }
        print(
            f"{name:8s} {statistics.median(seconds):.3f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f}), processor "
            f"{statistics.median(processor):.3f} s, unwanted modules: {unwanted or 'none'}"
        )
    if "pack" in result:
        met = result["pack"]["median_s"] <= TARGET
        print(f"target for the pack: at most {TARGET} s: {'met' if met else 'MISSED'}")
        write_json(RESULTS / "import_time.json", result)


def _run(code: str, runs: int) -> tuple[list[float], list[float], str]:
    """Seconds on the clock and on the processor of each run, and modules that must not be there."""
    seconds, processor = [], []
    for _ in range(runs + 1):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.home()
        )
        if done.returncode:
            sys.exit(done.stderr)
        time, unwanted = done.stdout.split("\n")[-3:-1]
        clock, used = time.split()
        seconds.append(float(clock))
        processor.append(float(used))
    return seconds[1:], processor[1:], unwanted


if __name__ == "__main__":
    main()
