"""The clip and the picture that the workflow templates open, put where core's loaders look."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import folder_paths

logger = logging.getLogger(__name__)

_WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
EXAMPLES = (_WORKFLOWS / "s2dm_example.mp4", _WORKFLOWS / "s2dm_example.png")


def place_examples() -> None:
    """Copy the examples into ComfyUI's input folder, unless files of their names are there.

    Load Video and Load Image offer nothing but the input folder, and a template whose clip is
    missing can't be run. Where the folder can't be written the templates ask for the user's own.
    """
    for example in EXAMPLES:
        _place(example)


def _place(example: Path) -> None:
    target = Path(folder_paths.get_input_directory()) / example.name
    temporary = target.with_name(f".{example.stem}-{os.getpid()}{example.suffix}")
    # A folder that can't be read, or isn't there any more, fails at every one of these steps.
    try:
        if target.exists():
            return
        try:
            shutil.copyfile(example, temporary)
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.warning("%s was not placed in the input folder: %s", example.name, error)
    else:
        logger.info("Placed an example of the S2DM workflows at %s", target)
