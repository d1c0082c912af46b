"""What a short training of a flow adapter on one CPU reaches: the nodes' trainer, 30 clips.

The bundled U-Net stays as it is; a new adapter learns on it for some minutes. Flow error on
held-out clips, before and after: 0 follows perfectly, 1 is what a clip scores that stands still.

    python benchmarks/adapter_quick.py --minutes 15
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from common import RESULTS, RUNS, show

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.data import DataConfig, build_dataset, held_out_clips
from s2dm.data.prepared import Source, prepare_clips
from s2dm.evaluation.clip_metrics import flow_error, pooled_figure
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.files import write_json
from s2dm.flow import estimate_flow
from s2dm.models import Checkpoint, FlowAdapterConfig, load_checkpoint, save_checkpoint
from s2dm.pipelines import FlowToVideoPipeline
from s2dm.pipelines.modules import build
from s2dm.training.adapter_run import AdapterRunConfig, denoiser_of, encoders_of
from s2dm.training.flow_adapter import AdapterTrainer, new_adapter
from s2dm.training.models import frozen_vae, load_model

CLIPS = 30
TARGET = 2 / 3  # of the untrained adapter's flow error


class _TimeIsUp(Exception):  # noqa: N818 (it is no error)
    pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--fusion", default="channel+spatial")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=8, help="clips to measure on")
    parser.add_argument("--steps", type=int, default=12, help="of the sampler")
    options = parser.parse_args()
    folder = RUNS / f"adapter_quick_{options.fusion}"
    card = ProtocolCard(
        checkpoint=f"{DEFAULT_CHECKPOINT.name} {file_hash(DEFAULT_CHECKPOINT)}",
        clips=options.held_out,
        data=f"puppets, test split; trained on {CLIPS} clips spread over the training takes",
        frames=16,
        size=(128, 128),
        seeds=[0],
        notes={
            "training": f"{options.minutes:g} minutes, {options.fusion}, "
            f"learning rate {options.learning_rate:g}, 2 clips of 4 frames a step",
            "sampling": f"DDIM, {options.steps} steps, guidance 4, no anchor",
            "flow_error": "flow measured in the generated clip (DIS) against the given flow",
        },
    )
    show("A short training of a flow adapter", card)
    device = torch.device("cpu")
    start = load_model(DEFAULT_CHECKPOINT, ["unet", "vae", "text_encoder"])
    vae = frozen_vae(*start["vae"], device)
    data = DataConfig()
    clips = build_dataset(data)
    chosen = torch.linspace(0, len(clips) - 1, CLIPS).long().tolist()
    sources = [Source(f"clip {n}", f"puppets {n}", lambda n=n: clips[n]) for n in chosen]
    prepared = prepare_clips(
        folder / "clips", sources, CLIPS, encoders_of(start, vae, device),
        lambda done, total: print(f"prepared {done} of {total}", end="\r", flush=True),
    )  # fmt: skip
    config = AdapterRunConfig(
        checkpoint=str(DEFAULT_CHECKPOINT), learning_rate=options.learning_rate, clips=2, frames=4,
        chunk=8, steps=100_000, warmup_steps=20, ema_decay=0.98, gradient_checkpointing=False,
    )  # fmt: skip
    adapter = new_adapter(FlowAdapterConfig.for_unet(start.config.unet, fusion=options.fusion), 0)
    before = measure(folder, adapter.config, adapter.state_dict(), options)
    print(f"\nuntrained: flow error {before:.3f}", flush=True)
    denoiser = denoiser_of(build(start, "unet"), start.config, adapter, prepared, device, config)
    run = AdapterTrainer(config.settings, adapter, denoiser, prepared, folder / "run", resume=False)
    began = time.monotonic()

    def on_step(run: AdapterTrainer) -> None:
        if time.monotonic() - began > 60 * options.minutes:
            raise _TimeIsUp

    try:
        run.run(on_step)
    except _TimeIsUp:
        print(f"{run.step} steps", flush=True)
    after = measure(folder, adapter.config, run.averaged_state("adapter"), options)
    figures = {"steps": run.step, "untrained": before, "trained": after, "share": after / before}
    print(f"trained: flow error {after:.3f}, {after / before:.2f} of the untrained")
    print(f"target: at most {TARGET:.2f}: {'met' if after <= TARGET * before else 'MISSED'}")
    write_json(RESULTS / "adapter_quick.json", {"protocol": card.to_dict(), **figures})


def measure(folder: Path, config: FlowAdapterConfig, state: dict, options) -> float:
    """Flow error of the bundled model with this adapter, on held-out clips."""
    bundled = load_checkpoint(DEFAULT_CHECKPOINT, ["unet", "vae", "text_encoder"])
    whole = load_checkpoint(DEFAULT_CHECKPOINT).config
    parts = {**bundled.states, "flow_adapter": state}
    model = Checkpoint(dataclasses.replace(whole, flow_adapter=config), parts)
    path = folder / "model.safetensors"
    save_checkpoint(path, model, torch.float16)
    pipeline = FlowToVideoPipeline.from_single_file(path)
    pipeline.set_progress_bar_config(disable=True)
    sampling = {"steps": options.steps, "guidance_scale": 4.0, "anchor_end": 0.0}
    sampling |= {"reference_attention": False, "flow_guidance_scale": None, "flow_start": 0.0}
    totals = []
    for clip in held_out_clips(DataConfig(), options.held_out):
        frames = pipeline(clip.caption, clip.flow, sampling=sampling, seed=0).frames
        totals.append(flow_error(estimate_flow(frames), clip.flow))
    return pooled_figure(totals)


if __name__ == "__main__":
    main()
