"""What every node of the pack shares: one schema for all versions of ComfyUI, named errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io

from ..s2dm.models import LATENT_CELL

# Fields that newer versions of ComfyUI have and older ones refuse.
_NEWER_FIELDS = {"search_aliases", "advanced"}

_LARGEST_SEED = 2**64 - 1

_FLOWS = ("flow", "first", "second")  # inputs of this name are flow, at every node

MOST_FRAMES = 4096
"""Of a clip or a flow. Only stage 1 knows fewer, and memory often ends earlier."""


def known(kind: Callable[..., Any], **fields: Any) -> dict[str, Any]:
    """The fields without those that this version of ComfyUI doesn't know of `kind`.

    Only fields that are known to be newer may be dropped, so that a misspelt one still fails.
    """
    parameters = inspect.signature(kind).parameters
    return {
        name: value
        for name, value in fields.items()
        if name in parameters or name not in _NEWER_FIELDS
    }


def schema(**fields: Any) -> io.Schema:
    """An `io.Schema`; `search_aliases` is used where the version has them."""
    return io.Schema(**known(io.Schema, **fields))


def advanced(kind: type[io.Input], name: str, **fields: Any) -> io.Input:
    """An input that few change: folded away where the version can do that."""
    return kind(name, **fields, **known(kind, advanced=True))


def flow_strength(tooltip: str) -> io.Input:
    """How strongly flow acts, from not at all to four times as strongly as in training."""
    return io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05, tooltip=tooltip)


def seed_input(tooltip: str) -> io.Input:
    """A seed, with the widget that changes it after each run."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=_LARGEST_SEED,
        control_after_generate=True,
        tooltip=tooltip,
    )


def frames_input(tooltip: str, default: int = 16, least: int = 1, name: str = "frames") -> io.Input:
    """A number of frames, or the number of a frame."""
    return io.Int.Input(name, default=default, min=least, max=MOST_FRAMES, tooltip=tooltip)


def share_input(
    name: str, default: float, tooltip: str, least: float = 0.0, folded: bool = False
) -> io.Input:
    """A number up to 1; folded away, as few change it, if `folded`."""
    fields = {"default": default, "min": least, "max": 1.0, "step": 0.01, "tooltip": tooltip}
    if folded:
        return advanced(io.Float.Input, name, **fields)
    return io.Float.Input(name, **fields)


def side_inputs(
    tooltip: str, default: int = 128, least: int = LATENT_CELL, most: int = 8192
) -> list[io.Input]:
    """Width and height in whole latent cells; the tooltip goes on from the name of the side."""
    return [
        io.Int.Input(
            side,
            default=default,
            min=least,
            max=most,
            step=LATENT_CELL,
            tooltip=f"{side.capitalize()} {tooltip}",
        )
        for side in ("width", "height")
    ]


def steps_input(most: int, tooltip: str) -> io.Input:
    """Steps of a sampler, 20 as in the paper."""
    return io.Int.Input("steps", default=20, min=1, max=most, tooltip=tooltip)


def cfg_input(default: float, tooltip: str) -> io.Input:
    """A guidance scale, in the range of core's KSampler."""
    return io.Float.Input(
        "cfg", default=default, min=0.0, max=100.0, step=0.05, round=0.01, tooltip=tooltip
    )


def check_finite(**values: float) -> None:
    """Refuse NaN and infinity, which ComfyUI lets through, by the input's name.

    Raises:
        ValueError: a value is not finite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}.")


def check_given(**values: Any) -> None:
    """Refuse what a switch of another pack hands on when nothing is connected to it, or a flow that
    isn't ours, by the input's name.

    values: of inputs that have to be there. Flows among them are called flow, first and second.

    Raises:
        ValueError: a value is None, or no flow.
    """
    for name, value in values.items():
        if value is None:
            raise ValueError(
                f"{name}: expected something at this input, got nothing. Look at the node before "
                "it: it hands on nothing, as a switch does whose own input is empty."
            )
        if name in _FLOWS and not hasattr(value, "displacement"):
            raise ValueError(
                f"{name}: expected a flow, got {type(value).__name__}. Connect a node of this pack "
                "that makes flow, such as Estimate Flow or Load Flow."
            )


@contextmanager
def named_errors(node: type[io.ComfyNode]) -> Iterator[None]:
    """Put the node's display name before what the library or a disk says is wrong.

    Raises:
        ValueError: in place of one of the library, or of an OSError.
    """
    # While it runs a node is a locked copy, on which GET_SCHEMA can't store what it makes.
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node.define_schema().display_name}: {error}") from error
    except OSError as error:
        raise ValueError(f"{node.define_schema().display_name}: {_told(error)}") from error


def _told(error: OSError) -> str:
    """What a disk says, with the file: a full one, a folder that isn't ours, too long a name."""
    file = "" if error.filename is None else f" ({error.filename})"
    return (
        f"expected a file that can be read or written, got: {error.strerror or error}{file}. Look "
        "at the disk's free space, at the rights on the folder, and at the name."
    )
