"""What several commands share of their options."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "assets" / "s2dm-puppets-v3.safetensors"


class CommandError(ValueError):
    """Arguments that don't fit together; the message says what to do."""


def check_exists(checkpoint: Path) -> None:
    if checkpoint.exists():
        return
    if checkpoint == DEFAULT_CHECKPOINT:
        raise CommandError(
            f"The bundled checkpoint is missing at {checkpoint}. Get the complete package, "
            "or give another one with --checkpoint."
        )
    raise CommandError(f"There is no checkpoint at {checkpoint}.")


def add_sampling(parser: argparse._ActionsContainer) -> None:
    """Options whose default the checkpoint knows, see `SamplingConfig`."""
    parser.add_argument(
        "--steps", type=positive, help="sampling steps (what the checkpoint recommends)"
    )
    parser.add_argument(
        "--guidance", type=number, help="guidance scale, 1 = off (what the checkpoint recommends)"
    )
    parser.add_argument(
        "--flow-guidance",
        type=number,
        help="guidance scale of the flow (what the checkpoint recommends, else that of the prompt)",
    )
    parser.add_argument(
        "--flow-start",
        type=number,
        help="part of the noise schedule, 0 to 1, before the flow acts (what the checkpoint "
        "recommends)",
    )
    parser.add_argument(
        "--anchor-end",
        type=number,
        help="part of the noise schedule, 0 to 1, until which the frames are anchored to frame 1, "
        "0 = off, the paper's plain method (what the checkpoint recommends)",
    )
    parser.add_argument(
        "--reference-attention",
        action=argparse.BooleanOptionalAction,
        help="let every frame see frame 1 in self-attention (what the checkpoint recommends)",
    )
    parser.add_argument(
        "--key-frame",
        action=argparse.BooleanOptionalAction,
        help="draw the frame that moves most before frame 1, so that somebody stands where the "
        "given flow says (what the checkpoint recommends)",
    )


def sampling_entries(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `add_sampling`, as entries of `SamplingConfig`."""
    entries = {
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "flow_guidance_scale": options.flow_guidance,
        "flow_start": options.flow_start,
        "anchor_end": options.anchor_end,
        "reference_attention": options.reference_attention,
        "key_frame": options.key_frame,
    }
    return {name: value for name, value in entries.items() if value is not None}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def rate(text: str) -> float:
    """Frames a second."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT or one number for both."""
    parts = text.lower().split("x")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 128x128, got {text!r}")
    return positive(parts[0]), positive(parts[1])
