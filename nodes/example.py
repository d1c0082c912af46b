"""The clip that the workflow templates open, put where core's Load Video looks for it."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import folder_paths

logger = logging.getLogger(__name__)

CLIP = Path(__file__).resolve().parents[1] / "workflows" / "s2dm_example.mp4"


def place_example_clip() -> None:
    """Copy the example clip into ComfyUI's input folder, unless a file of that name is there.

    Load Video offers nothing but the input folder, and a template whose clip is missing can't be
    run. Where the folder can't be written the templates ask for a clip of the user's own.
    """
    target = Path(folder_paths.get_input_directory()) / CLIP.name
    temporary = target.with_name(f".{CLIP.stem}-{os.getpid()}{CLIP.suffix}")
    # A folder that can't be read, or isn't there any more, fails at every one of these steps.
    try:
        if target.exists():
            return
        try:
            shutil.copyfile(CLIP, temporary)
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.warning("The example clip was not placed in the input folder: %s", error)
    else:
        logger.info("Placed the example clip of the S2DM workflows at %s", target)
