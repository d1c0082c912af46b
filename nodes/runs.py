"""What the nodes that train share: names and folders of runs, bars and previews, and inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image

from ..s2dm.training.curves import loss_picture
from ..s2dm.video import to_uint8
from .native.chunks import is_out_of_memory
from .native.training import PRECISIONS
from .schema import advanced

_NAME = re.compile(r"[\w][\w .-]*")


def named_folder(kind: str, name: str) -> Path:
    """Where a node keeps the files of a name, in the output folder.

    Raises:
        ValueError: a name that is none of a file.
    """
    if not _NAME.fullmatch(name.strip()):
        raise ValueError(
            f"expected a name of letters, digits, spaces, dots and dashes, got {name!r}: it "
            "becomes the name of a file."
        )
    return Path(folder_paths.get_output_directory()) / kind / name.strip()


def steps_input(default: int) -> io.Input:
    """Steps of a training."""
    return io.Int.Input(
        "steps",
        default=default,
        min=1,
        max=1_000_000,
        tooltip="Steps in all. A run that has made them can go on with more.",
    )


def learning_rate_input(default: float) -> io.Input:
    """The learning rate of a training."""
    return io.Float.Input(
        "learning_rate",
        default=default,
        min=1e-7,
        max=1.0,
        step=1e-7,
        tooltip="How far a step goes. Lower it if the loss grows or is no number.",
    )


def clips_per_step_input(default: int) -> io.Input:
    """What a step of a training learns from."""
    return advanced(
        io.Int.Input,
        "clips_per_step",
        default=default,
        min=1,
        max=256,
        tooltip="Clips that a step learns from. More: steadier, and slower.",
    )


def at_once_input(things: str, network: str, most: int) -> io.Input:
    """How much of a step is computed at a time."""
    return advanced(
        io.Int.Input,
        f"{things}_at_once",
        default=4,
        min=1,
        max=most,
        tooltip=(
            f"How many {things} the {network} computes at once. Fewer need less memory, and the "
            "result is the same."
        ),
    )


def precision_input(computes: str) -> io.Input:
    """The type of numbers of a training; `computes` says what computes in it, and what doesn't."""
    return advanced(
        io.Combo.Input,
        "precision",
        options=list(PRECISIONS),
        default=PRECISIONS[0],
        tooltip=(
            f"In which {computes} in fp32. auto: bf16 where the card is good at it, else fp32."
        ),
    )


def keeping_inputs() -> list[io.Input]:
    """How often a training saves and shows what it has, and whether it goes on with it."""
    return [
        advanced(
            io.Int.Input,
            "save_every",
            default=100,
            min=1,
            max=100_000,
            tooltip="Steps between two states on disk, for a power cut or a crash.",
        ),
        advanced(
            io.Int.Input,
            "preview_every",
            default=100,
            min=0,
            max=100_000,
            tooltip="Steps between two sampled clips in the node. 0: the loss alone.",
        ),
        advanced(
            io.Boolean.Input,
            "resume",
            default=True,
            tooltip="Go on with the run of this name, if there is one. Off: start anew.",
        ),
    ]


def loss_output() -> io.Output:
    """The loss of a training."""
    return io.Image.Output(
        "loss", display_name="loss", tooltip="The loss of each step, as a picture."
    )


def check_interrupt() -> None:
    """Stop where the user has cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def train(
    trainer: Any,
    path: Path,
    save_every: int,
    preview_every: int,
    picture: Callable[[Any], torch.Tensor | None],
    **told: Any,
) -> torch.Tensor:
    """Run a trainer to its end, with a bar and previews; whatever ends it, its file is written.

    Args:
        trainer: with its state and its `export`.
        path: of the file, written every `save_every` steps and at the end.
        save_every, preview_every: in steps.
        picture: what to show above the loss, (3,h,w) in [0,1], or None.
        told: what `export` is to write beside what the trainer knows.

    Returns:
        The loss of each step as an IMAGE.
    """
    steps = trainer.settings.steps
    bar = comfy.utils.ProgressBar(steps)

    def on_step(trainer: Any) -> None:
        if trainer.step % save_every == 0 and trainer.step < steps:
            trainer.export(path, **told)
        if preview_every and trainer.step % preview_every == 0:
            bar.update_absolute(trainer.step, steps, _shown(picture(trainer), trainer.losses))
        else:
            bar.update_absolute(trainer.step, steps)

    try:
        trainer.run(on_step)
    except comfy.model_management.InterruptProcessingException:
        if trainer.step:
            trainer.export(path, **told)
        raise
    trainer.export(path, **told)
    return loss_picture(trainer.losses).movedim(0, -1)[None].contiguous()


@contextmanager
def memory(remedy: str) -> Iterator[None]:
    """Say what to change when memory runs out. What was learned is on disk by then."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory. {remedy}, then run it again: it goes on where it was."
        ) from error


def _shown(sheet: torch.Tensor | None, losses: list[float]) -> tuple[str, Any, int]:
    """A clip above the loss, as the picture of a progress bar."""
    curve = loss_picture(losses)
    parts = [curve]
    if sheet is not None:
        width = curve.shape[-1]
        height = round(sheet.shape[-2] * width / sheet.shape[-1])
        parts.insert(
            0, comfy.utils.common_upscale(sheet[None], width, height, "area", "disabled")[0]
        )
    picture = Image.fromarray(to_uint8(torch.cat(parts, dim=1)))
    return "JPEG", picture, max(picture.size)
