"""Does a generated clip move as the given flow says, and does the rest stand still?

On puppets of the test split (persons x actions that training never saw): the exact flow of a clip
and its caption go into the model, and the flow of the generated clip is estimated and compared
with the flow that was given. Beside it, in the same units:

  zero flow   the same model, given zero flow: what a clip scores that ignores the motion
  estimator   the true clip: the error of the estimator itself, which no model can beat by much
  VAE         the true clip through the autoencoder: the same floor for clips that are decoded

Every clip is stored when it is done, and a stopped run goes on where it was.

    python benchmarks/flow_following.py
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, RUNS, show
from torch import Tensor
from tqdm import tqdm

from s2dm.data.puppets import Clip, render_clip, split
from s2dm.evaluation.clip_metrics import (
    MOVING,
    Total,
    flicker,
    flow_error,
    motion_magnitude,
    moving_region,
    pooled,
    warp_error,
)
from s2dm.evaluation.distances import bootstrap_interval
from s2dm.evaluation.protocol import ProtocolCard, file_hash, write_json
from s2dm.flow import FlowField, estimate_flow, flow_to_image
from s2dm.pipelines import FlowToVideoPipeline
from s2dm.video import write_contact_sheet

TAKE = 1000  # a take that no training run renders
TARGET_ERROR, TARGET_STILL = 0.5, 3.0


@dataclass(frozen=True)
class Settings:
    """What decides a clip's result; another value, another folder of stored clips."""

    steps: int = 20
    guidance: float = 7.5
    flow_guidance: float | None = None
    seed: int = 0
    size: int = 128
    frames: int = 16
    method: str = "dis"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "s2dm" / "assets" / "s2dm-puppets-v1.safetensors"
    parser.add_argument("--checkpoint", type=Path, default=default)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--sheet-clips", type=int, default=4, help="clips on the sheet of pictures")
    parser.add_argument(
        "--part", nargs=2, type=int, metavar=("K", "N"), default=(1, 1),
        help="compute only every Nth clip from the Kth on and write no results: for several "
        "processes at once, before a run without it",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "flow_following.json")
    for setting in dataclasses.fields(Settings):
        kind = {"flow_guidance": float, "method": str}.get(setting.name, type(setting.default))
        name = "--" + setting.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=setting.default)
    options = parser.parse_args()
    names = [setting.name for setting in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})

    pairs = split("test")
    random.Random(settings.seed).shuffle(pairs)
    pairs = pairs[: options.clips]
    weights = file_hash(options.checkpoint)
    guidance = f"guidance {settings.guidance:g}"
    if settings.flow_guidance is not None:
        guidance += f" (flow {settings.flow_guidance:g})"
    card = ProtocolCard(
        checkpoint=f"{options.checkpoint.name} ({weights})",
        clips=len(pairs),
        data=f"puppets, of {len(split('test'))} held-out person x action combinations in an order "
        f"seeded with {settings.seed}, take {TAKE}",
        frames=settings.frames,
        size=(settings.size, settings.size),
        value_range=(0.0, 1.0),
        seeds=[settings.seed],
        notes={
            "sampling": f"DDIM, {settings.steps} steps, {guidance}, float32",
            "flow error": f"end-point error between given flow and {settings.method} flow of the "
            f"clip, where the given flow is longer than {MOVING:g} pixel and not occluded, over "
            "its mean length there",
            "still": "standard deviation over time of background that the puppet never covers, "
            "of 255",
            "warp error": "mean |frame i - frame 1 warped by the given flow| where visible, of 255",
        },
    )
    _one_thread_of_opencv()
    show("Flow following on held-out puppets", card)

    key = json.dumps([weights, "totals", dataclasses.asdict(settings)])
    store = RUNS / "flow_following" / hashlib.sha256(key.encode()).hexdigest()[:12]
    pipeline = FlowToVideoPipeline.from_single_file(options.checkpoint).to(options.device)
    results = []
    part, parts = options.part
    chosen = list(enumerate(pairs))[part - 1 :: parts]
    for number, (person, action) in tqdm(chosen, unit="clip"):
        path = store / f"{person:03d}-{action:02d}.json"
        result = json.loads(path.read_text("utf-8")) if path.exists() else {}
        missing = [mode for mode in options.modes if mode not in result.get("scores", {})]
        pictures = store / f"{person:03d}-{action:02d}.pt"
        if missing:
            clip = render_clip(person, action, TAKE, settings.size, settings.frames)
            made = {mode: MODES[mode](pipeline, clip, settings, options.chunk) for mode in missing}
            result = _add(result, clip, made, settings)
            write_json(path, result)
            if number < options.sheet_clips:
                _store_pictures(pictures, clip, made)
        results.append(result)
    if parts > 1:
        return
    table = summarise(results, options.modes)
    print(markdown(table))
    sheet = options.output.with_suffix(".jpg")
    _write_sheet(sheet, store, pairs[: options.sheet_clips], options.modes)
    write_json(options.output, {"protocol": card.to_dict(), "table": table, "sheet": sheet.name})
    print(f"\n{options.output}\n{sheet}")


def _one_thread_of_opencv() -> None:
    """OpenCV's own threads slow it down many times where other processes are busy."""
    import cv2

    cv2.setNumThreads(1)


# ------------------------------------------------------------------------- what is measured


def _generate(
    pipeline: FlowToVideoPipeline,
    clip: Clip,
    flow: FlowField,
    settings: Settings,
    chunk: int,
    sharing: str,
) -> Tensor:
    pipeline.set_progress_bar_config(leave=False, desc=sharing)
    return pipeline(
        clip.caption,
        flow,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        flow_guidance_scale=settings.flow_guidance,
        seed=settings.seed,
        noise_sharing=sharing,
        chunk_size=chunk,
    ).frames


def _shared(pipeline, clip, settings, chunk):
    return _generate(pipeline, clip, clip.flow, settings, chunk, "shared")


def _independent(pipeline, clip, settings, chunk):
    return _generate(pipeline, clip, clip.flow, settings, chunk, "independent")


def _zero_flow(pipeline, clip, settings, chunk):
    # Without motion and with shared noise all frames are equal: one is enough.
    still = FlowField.zeros(1, settings.size, settings.size)
    frame = _generate(pipeline, clip, still, settings, chunk, "shared")
    return frame.expand(settings.frames, -1, -1, -1)


def _estimator(pipeline, clip, settings, chunk):
    return clip.frames


@torch.no_grad()
def _vae(pipeline, clip, settings, chunk):
    vae = pipeline.vae
    frames = [
        vae.decode(vae.encode(part.to(vae.device) * 2 - 1).latent_dist.mode()).sample.cpu()
        for part in clip.frames.split(chunk)
    ]
    return (torch.cat(frames) / 2 + 0.5).clamp(0, 1)


MODES = {
    "shared": _shared,
    "independent": _independent,
    "zero flow": _zero_flow,
    "estimator": _estimator,
    "VAE": _vae,
}
TITLES = {
    "shared": "generated, shared noise",
    "independent": "generated, independent noise",
    "zero flow": "generated, given zero flow",
    "estimator": "true clip (the estimator's own error)",
    "VAE": "true clip through the VAE",
}


def score(frames: Tensor, clip: Clip, method: str) -> dict[str, Total]:
    """Compare a clip (N, 3, H, W) with the flow it was to follow and with standing still."""
    error = flow_error(estimate_flow(frames, method), clip.flow)
    motion = motion_magnitude(clip.flow, moving_region(clip.flow))
    return {
        "error": error,
        "error_pixels": Total(error.total, motion.weight),
        "motion_pixels": motion,
        "still": flicker(frames, clip.still),
        "warp": warp_error(frames, clip.flow),
    }


def _add(
    result: dict[str, Any], clip: Clip, made: dict[str, Tensor], settings: Settings
) -> dict[str, Any]:
    scores = {
        mode: {
            name: dataclasses.astuple(total)
            for name, total in score(frames, clip, settings.method).items()
        }
        for mode, frames in made.items()
    }
    return {"caption": clip.caption, "scores": result.get("scores", {}) | scores}


def summarise(results: list[dict[str, Any]], modes: list[str]) -> dict[str, dict[str, Any]]:
    """For each mode the pooled figures, with 95 % intervals over clips by bootstrap."""
    table = {}
    for mode in modes:
        row: dict[str, Any] = {}
        for name in ("error", "error_pixels", "motion_pixels", "still", "warp"):
            totals = [Total(*result["scores"][mode][name]) for result in results]
            row[name] = pooled(totals).figure
            row[f"{name}_95"] = bootstrap_interval(_figure, totals, samples=1000)
        table[mode] = row
    return table


def _figure(totals: list[Total]) -> float:
    return pooled(totals).figure


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table of the results page."""
    motion = next(iter(table.values()))["motion_pixels"]
    lines = [
        "| clip | flow error / motion (95 %) | flow error, px | still background, of 255 (95 %) | "
        "warp error, of 255 |",
        "|---|---|---|---|---|",
    ]
    for mode, row in table.items():
        low, high = row["error_95"]
        calm, busy = row["still_95"]
        lines.append(
            f"| {TITLES[mode]} | {row['error']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{row['error_pixels']:.1f} of {motion:.1f} | "
            f"{row['still']:.1f} ({calm:.1f} to {busy:.1f}) | {row['warp']:.1f} |"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------- pictures


def _store_pictures(path: Path, clip: Clip, made: dict[str, Tensor]) -> None:
    stored = torch.load(path, weights_only=True) if path.exists() else {}
    stored |= {mode: (frames * 255).round().byte() for mode, frames in made.items()}
    stored |= {"true": (clip.frames * 255).round().byte()}
    stored |= {"flow": (flow_to_image(clip.flow) * 255).round().byte()}
    torch.save(stored, path)


def _write_sheet(path: Path, store: Path, pairs: list[tuple[int, int]], modes: list[str]) -> None:
    rows, labels = [], []
    for person, action in pairs:
        name = store / f"{person:03d}-{action:02d}"
        if not name.with_suffix(".pt").exists():
            continue
        stored = torch.load(name.with_suffix(".pt"), weights_only=True)
        caption = json.loads(name.with_suffix(".json").read_text("utf-8"))["caption"]
        wanted = {"true": caption, "flow": "given flow"}
        wanted |= {m: TITLES[m] for m in ("shared", "independent", "zero flow") if m in modes}
        for kind, label in wanted.items():
            rows.append(stored[kind].float() / 255)
            labels.append(label)
    if rows:
        write_contact_sheet(path, rows, labels, columns=8)


if __name__ == "__main__":
    main()
