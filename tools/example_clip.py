"""Render the clip that the bundled workflows open: a puppet the checkpoint never saw.

python tools/example_clip.py
"""

import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
sys.path.append(str(PACK))

from s2dm.data.puppets import render_clip, split  # noqa: E402
from s2dm.video import write_clip  # noqa: E402

PERSON, ACTION = 1, 26  # held out: in the test split
CLIP = PACK / "workflows" / "s2dm_example.mp4"


def main() -> None:
    if (PERSON, ACTION) not in split("test"):
        raise SystemExit(f"Person {PERSON}, action {ACTION} was trained on: choose another.")
    clip = render_clip(PERSON, ACTION, take=0)
    print(f"{write_clip(CLIP, clip.frames)}: {clip.caption}")


if __name__ == "__main__":
    main()
