"""Peak memory and time of a step that trains a flow adapter on a frozen U-Net.

Two questions: whether memory grows with the number of frames (the chunk stays the same), and what
a step of Stable Diffusion 1.5's full size takes, of the adapter alone and with a LoRA on the U-Net
(random weights: memory and time don't depend on them). Each case runs in a process of its own, so
that peaks don't mix. Memory is the highest resident set of that process, the weights included, or
on a GPU what PyTorch allocated there at most; figures are in float32.

    python benchmarks/adapter_training.py                # the bundled model's size
    python benchmarks/adapter_training.py --full         # and Stable Diffusion 1.5's, in about 9 GB
    python benchmarks/adapter_training.py --only LoRA    # one case; the file's other rows stay
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, show

from s2dm.data import Clip
from s2dm.data.prepared import Encoders, PreparedClips, Source, prepare_clips
from s2dm.evaluation.protocol import ProtocolCard
from s2dm.files import write_json
from s2dm.flow import FlowField
from s2dm.models import PUPPETS, SD15, FlowAdapterConfig, S2DMConfig
from s2dm.pipelines.modules import build_unet
from s2dm.training.adapter_run import AdapterRunConfig, denoiser_of
from s2dm.training.flow_adapter import AdapterTrainer, new_adapter

TARGET = 1.1  # peak of 64 frames over that of 8
MOST = {"": 12_000, ", LoRA of rank 8": 16_000}  # MB that a step of full size may take
MODELS = {"puppets": PUPPETS, "sd15": SD15}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fusion", default="channel+spatial", help="how flow joins")
    parser.add_argument("--full", action="store_true", help="also Stable Diffusion 1.5's size")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, of the full size")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--case", nargs="+", help="internal")
    options = parser.parse_args()
    if options.case:
        name, *numbers = options.case
        print(json.dumps(measure(MODELS[name], options.fusion, *map(int, numbers))))
        return
    notes = {
        "model": "random weights, float32, gradient checkpointing, one thread",
        "joining": options.fusion,
        "peak_mb": "highest resident set of a process that makes two steps, weights included",
    }
    card = ProtocolCard(notes=notes)
    show("Training a flow adapter: memory and time of a step", card)
    path = RESULTS / "adapter_training.json"
    figures: dict[str, dict[str, Any]] = {}
    protocol, made_by = card.to_dict(), {}
    if options.only:
        stored = json.loads(path.read_text("utf-8"))
        figures = {row.pop("case"): row for row in stored["rows"]}
        made_by = {key: protocol[key] for key in ("command", "code")}
        protocol = stored["protocol"]
    for name, case in cases(options.size, options.full or bool(options.only)).items():
        if options.only in name:
            command = [sys.executable, __file__, "--fusion", options.fusion, "--case", *case]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures[name] = {**json.loads(done.stdout.splitlines()[-1]), **made_by}
            print(f"{name}: {figures[name]}", flush=True)
    few, many = (figures[name] for name in cases(options.size, full=False))
    ratio = round(many["peak_mb"] / few["peak_mb"], 3)
    print(f"\npeak memory, 64 frames over 8 in chunks of 4: {ratio}, at most {TARGET}")
    for name, row in figures.items():
        for kind, most in MOST.items():
            if name.startswith("sd15") and name.endswith(f"pixels{kind}"):
                print(f"{name}: {row['peak_mb']} MB, at most {most}")
    rows = [{"case": name, **values} for name, values in figures.items()]
    write_json(path, {"protocol": protocol, "rows": rows, "peak_ratio": ratio})


def cases(size: int, full: bool) -> dict[str, list[str]]:
    """Arguments of each case by its name: model, frames, chunk, size, rank of a LoRA."""
    chosen = [("puppets", 8, 4, 128, 0), ("puppets", 64, 4, 128, 0)]
    if full:
        chosen += [("sd15", 1, 1, size, 0), ("sd15", 1, 1, size, 8)]
    found = {}
    for model, frames, chunk, side, rank in chosen:
        name = f"{model}, {frames} frames, chunk {chunk}, {side} pixels"
        found[name + (f", LoRA of rank {rank}" if rank else "")] = [
            *map(str, (model, frames, chunk, side, rank))
        ]
    return found


def measure(
    model: S2DMConfig, fusion: str, frames: int, chunk: int, size: int, rank: int = 0
) -> dict[str, float]:
    """Peak and time of the second step; the first one makes the optimiser's state."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        clips = _clips(Path(folder) / "clips", model, frames, size)
        config = AdapterRunConfig(
            checkpoint="random",
            steps=2,
            clips=1,
            frames=0,
            chunk=chunk,
            warmup_steps=1,
            save_every=9,
            lora_rank=rank,
        )
        adapter = new_adapter(FlowAdapterConfig.for_unet(model.unet, fusion=fusion), 0)
        adapter, unet = adapter.to(device), build_unet(model.unet).to(device)
        denoiser = denoiser_of(unet, model, adapter, clips, device, config)
        run = AdapterTrainer(config.settings, adapter, denoiser, clips, Path(folder) / "run")
        times = []
        run.run(lambda run: times.append(time.monotonic()))
        buffers = sum(weight.grad is not None for weight in unet.parameters())
        learning = [adapter] if denoiser.lora is None else [adapter, denoiser.lora]
        learns = sum(w.numel() for network in learning for w in network.parameters())
    return {
        "peak_mb": _peak_mb(device),
        "seconds_a_step": round(times[1] - times[0], 2),
        "gradient_buffers_of_the_base": buffers,
        "millions_of_weights_that_learn": round(learns / 1e6, 1),
    }


def _peak_mb(device: torch.device) -> int:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _clips(folder: Path, model: S2DMConfig, frames: int, size: int) -> PreparedClips:
    """One clip that doesn't move, with latents and prompt of random numbers."""
    cell = model.vae.factor

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        shape = (len(pixels), model.unet.in_channels, *(s // cell for s in pixels.shape[-2:]))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def text(caption: str) -> torch.Tensor:
        return torch.randn(77, model.unet.context_dim, generator=torch.Generator().manual_seed(1))

    def load() -> Clip:
        still = FlowField.zeros(frames, size, size)
        return Clip(torch.zeros(frames, 3, size, size, dtype=torch.uint8), still, "nothing")

    return prepare_clips(folder, [Source("clip", "0", load)], 1, Encoders(latents, text))


if __name__ == "__main__":
    main()
