"""The MUG Facial Expression Database as its authors give it out: folders of pictures.

Aifanti et al., "The MUG facial expression database" (WIAMIS 2010). Licence and files are the
authors'; who was allowed to use them may not pass them on.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..settings import SettingsError
from .recordings import Protocol, Recording
from .videos import find_clips

PROTOCOL = Protocol(
    recordings=1009, combinations=364, held_out_combinations=36, held_out_clips=78
)  # 931 clips remain to train on

EXPRESSIONS = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")


def find_mug(folder: str | os.PathLike[str]) -> list[Recording]:
    """The takes `SUBJECT/EXPRESSION/TAKE/*.jpg` in a folder.

    Some subjects have sessions, `SUBJECT/SESSION/EXPRESSION/TAKE`, which are all taken.

    Raises:
        SettingsError: there is none.
    """
    root, found = Path(folder), []
    for path in find_clips(root):
        above = [part.lower() for part in path.relative_to(root).parts[:-1]]
        if path.is_dir() and above and above[-1] in EXPRESSIONS:
            who = [part for part in above[:-1] if not part.startswith("session")]
            if who:
                found.append(Recording(path, who[-1], above[-1]))
    if not found:
        raise SettingsError(
            f"there are no recordings of MUG in {folder}: expected pictures such as "
            "001/anger/take000/img_0000.jpg. Set data.options.folder."
        )
    return found
