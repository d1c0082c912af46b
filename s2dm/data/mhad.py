"""UTD-MHAD as its authors publish it: the RGB videos, named by action, subject and trial.

Chen et al., "UTD-MHAD: A multimodal dataset for human action recognition utilizing a depth camera
and a wearable inertial sensor" (ICIP 2015): 27 actions of 8 persons in 4 trials, less the missing
a8_s1_t4, a23_s6_t4 and a27_s8_t4. Licence and files are the authors'.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..settings import SettingsError
from .recordings import Protocol, Recording

PROTOCOL = Protocol(
    recordings=861, combinations=216, held_out_combinations=21, held_out_clips=84
)  # 777 clips remain to train on

WINDOW = (156 / 640, 0.0, 492 / 640, 1.0)
"""The part of the 640x480 picture in which people move, as LFDM (arXiv 2303.13744) crops it."""

_NAME = re.compile(r"a(\d+)_s(\d+)_t(\d+)_color\.(?:avi|mp4)", re.IGNORECASE)


def find_mhad(folder: str | os.PathLike[str]) -> list[Recording]:
    """The RGB videos `a{action}_s{subject}_t{trial}_color.avi` anywhere in a folder.

    Raises:
        SettingsError: there is none.
    """
    found = {}
    for path in Path(folder).rglob("*"):
        if (name := _NAME.fullmatch(path.name)) and not path.name.startswith("._"):
            action, subject, trial = map(int, name.groups())
            found[subject, action, trial] = Recording(path, str(subject), str(action))
    if not found:
        raise SettingsError(
            f"there are no RGB videos of UTD-MHAD in {folder}: expected files named such as "
            "a1_s1_t1_color.avi, out of RGB-part1.zip to RGB-part4.zip. Set data.options.folder."
        )
    return [found[key] for key in sorted(found)]
