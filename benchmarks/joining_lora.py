"""What a LoRA on the U-Net adds to a flow adapter: both learn on, or the adapter alone does.

It starts from an adapter of `joining.py` and the frozen image model that it was trained on, and
goes on from there twice, from one seed and with the same clips, frames, noise and steps: once the
adapter alone learns, and once a LoRA on the U-Net's attention beside it. Everything goes on where
it was stopped. The intervals are over clips, of one training each.

    python benchmarks/joining_lora.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import joining
import torch
from common import RESULTS

from s2dm.data import build_dataset, register_dataset
from s2dm.data.prepared import PreparedClips, dataset_sources, prepare_clips
from s2dm.evaluation.protocol import file_hash
from s2dm.evaluation.run import evaluate
from s2dm.evaluation.tables import markdown_table
from s2dm.files import write_json
from s2dm.models import Checkpoint, load_checkpoint, save_checkpoint
from s2dm.pipelines.modules import build
from s2dm.training.adapter_run import AdapterRunConfig, denoiser_of, encoders_of
from s2dm.training.flow_adapter import AdapterTrainer, new_adapter
from s2dm.training.models import frozen_vae, load_model

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "warmup_steps": 20,
    "ema_decay": 0.98,
    "clips": 16,
    "frames": 2,
    "chunk": 32,
    "gradient_checkpointing": False,
    "save_every": 25,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fusion", choices=joining.FUSIONS, default="channel+spatial")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8], help="of LoRAs; 0: none")
    parser.add_argument("--further", type=int, default=200, help="steps")
    parser.add_argument("--train-only", action="store_true", help="leave out the evaluation")
    joining.add_shared_options(parser)
    parser.add_argument("--output", type=Path, default=RESULTS / "joining_lora.json")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    register_dataset("puppets-part", joining._part)
    base = joining.train_base(options)
    start = joining.train_adapter(options, base, options.fusion)
    exports = {rank: go_on(options, base, start, rank) for rank in options.ranks}
    if options.train_only:
        return
    result = measure(options, start, exports)
    print(markdown(result))
    write_json(options.output, result)
    print(f"\n{options.output}")


def go_on(options: argparse.Namespace, base: Path, start: Path, rank: int) -> Path:
    """The image model with the adapter, after further training; a LoRA is part of its U-Net."""
    folder = options.runs / f"{options.fusion}-lora{rank}-{options.further}"
    path = folder / "model.safetensors"
    if path.exists():
        return path
    model = load_model(base, ["unet", "vae", "text_encoder"])
    clips = prepared(options, model)
    learned = load_model(start, ["flow_adapter"])
    adapter = new_adapter(learned.config.flow_adapter, 0)
    adapter.load_state_dict(learned["flow_adapter"].state)
    config = AdapterRunConfig(
        checkpoint=str(base), steps=options.further, lora_rank=rank, fusion=options.fusion,
        **SETTINGS,
    )  # fmt: skip
    denoiser = denoiser_of(build(model, "unet"), model.config, adapter, clips, CPU, config)
    run = AdapterTrainer(config.settings, adapter, denoiser, clips, folder)
    run.run(lambda run: print(f"rank {rank}: step {run.step}, {run.losses[-1]:.4f}", flush=True))
    unet = model["unet"].state
    if denoiser.lora is not None:
        with run.averaged():
            for name in denoiser.lora.names:
                weight = unet[f"{name}.weight"]
                unet[f"{name}.weight"] = denoiser.lora.changed(name, weight)
    states = {**model.states, "unet": unet, "flow_adapter": run.averaged_state("adapter")}
    whole = load_checkpoint(start).config
    save_checkpoint(path, Checkpoint(whole, states), torch.float16)
    return path


def prepared(options: argparse.Namespace, model: Checkpoint) -> PreparedClips:
    """The training clips of the joinings as `s2dm train adapter` has them."""
    data = joining.settings(options, "").data
    clips = build_dataset(data)
    vae = frozen_vae(*model["vae"], CPU)
    return prepare_clips(
        options.runs / "prepared", dataset_sources(clips, f"{data}"), len(clips),
        encoders_of(model, vae, CPU),
        lambda done, total: print(f"prepared {done} of {total}", end="\r", flush=True),
    )  # fmt: skip


def measure(options: argparse.Namespace, start: Path, exports: dict[int, Path]) -> dict[str, Any]:
    """Figures of all on the same held-out clips."""
    table, hashes = {}, [f"adapter {file_hash(start)}"]
    for rank, export in exports.items():
        found = evaluate(joining.evaluation(options, export, (joining.PLAIN, joining.ANCHORED)))
        name = f"with a LoRA of rank {rank}" if rank else "adapter alone"
        for variant, row in found["table"].items():
            kind = "anchored" if variant == str(joining.ANCHORED) else "plain"
            table[f"{name}, {kind}"] = row
        hashes.append(f"{name} {file_hash(export)}")
    protocol = {
        **found["protocol"],
        "checkpoint": ", ".join(hashes),
        "start": f"{options.fusion} after {options.steps} steps on the frozen image model",
        "further training": f"{options.further} steps of {SETTINGS['clips']} clips with "
        f"{SETTINGS['frames']} frames, learning rate {SETTINGS['learning_rate']:g}, on "
        f"{options.training_clips} clips of the training split, 6 frames each",
    }
    return {"protocol": protocol, "table": table}


def markdown(result: dict[str, Any]) -> str:
    """The table of the results page."""
    return markdown_table(result["table"], {name: name for name in result["table"]})


if __name__ == "__main__":
    main()
