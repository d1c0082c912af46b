"""`s2dm render`: clips of the puppets, with their exact flow and captions."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import CommandError, positive, rate


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "render",
        help="render clips of the puppets with their exact flow and captions",
        description="Render puppets: each clip as a video, its exact flow (.npz) and its caption.",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("puppets"), help="folder")
    parser.add_argument(
        "--split", choices=("train", "test"), default="test", help="which clips (%(default)s)"
    )
    parser.add_argument("--clips", type=positive, default=8, help="how many (%(default)s)")
    parser.add_argument("--person", type=int, help="number of the person, with --action")
    parser.add_argument("--action", help="name or number of the action, with --person")
    parser.add_argument("--take", type=int, default=0, help="variation (%(default)s)")
    parser.add_argument("--frames", type=positive, default=16, help="frames (%(default)s)")
    parser.add_argument(
        "--pixels", type=positive, default=128, help="height and width (%(default)s)"
    )
    parser.add_argument("--format", choices=("mp4", "gif", "png"), default="mp4")
    parser.add_argument("--fps", type=rate, default=8.0, help="frames a second (%(default)s)")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet to this image")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..data.puppets import render_clip
    from ..flow import save_flow
    from ..video import write_clip, write_contact_sheet

    options.output.mkdir(parents=True, exist_ok=True)
    rows, labels = [], []
    for person, action in _puppets(options):
        clip = render_clip(person, action, options.take, size=options.pixels, frames=options.frames)
        name = options.output / f"person{person:02d}_action{action:02d}_take{options.take}"
        ending = "" if options.format == "png" else f".{options.format}"
        print(write_clip(name.with_name(name.name + ending), clip.frames, options.fps))
        save_flow(name.with_name(name.name + ".npz"), clip.flow)
        name.with_name(name.name + ".txt").write_text(clip.caption + "\n", encoding="utf-8")
        if options.sheet is not None:
            rows.append(clip.frames)
            labels.append(clip.caption)
    if options.sheet is not None:
        print(write_contact_sheet(options.sheet, rows, labels))


def _puppets(options: argparse.Namespace) -> list[tuple[int, int]]:
    """The (person, action) pairs that the options ask for."""
    from ..data.puppets import ACTIONS, PERSONS, split

    if (options.person is None) != (options.action is None):
        raise CommandError("--person and --action belong together: give both or neither.")
    if options.person is None:
        pairs = split(options.split)
        # Spread over the split, so that a few clips already show many persons and actions.
        count = min(options.clips, len(pairs))
        return [pairs[i * len(pairs) // count] for i in range(count)]
    if not 0 <= options.person < len(PERSONS):
        raise CommandError(f"--person must be from 0 to {len(PERSONS) - 1}, got {options.person}.")
    names = [action.name for action in ACTIONS]
    if options.action in names:
        return [(options.person, names.index(options.action))]
    if options.action.isdigit() and int(options.action) < len(names):
        return [(options.person, int(options.action))]
    raise CommandError(
        f"There is no action {options.action!r}. Expected a number from 0 to {len(names) - 1} or "
        f"one of: {', '.join(names)}."
    )
