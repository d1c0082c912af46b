"""Render what the bundled workflows open: puppets that the checkpoint never saw.

python tools/examples.py
"""

import dataclasses
import sys
from pathlib import Path

from PIL import Image

PACK = Path(__file__).resolve().parent.parent
sys.path.append(str(PACK))

from s2dm.data.puppets import ACTIONS, PERSONS, caption, render_clip, split  # noqa: E402
from s2dm.video import to_uint8, write_clip  # noqa: E402

PERSON, ACTION = 1, 26  # held out: in the test split
CLIP = PACK / "workflows" / "s2dm_example.mp4"
PICTURE = CLIP.with_suffix(".png")
WAVE = next(number for number, action in enumerate(ACTIONS) if action.name == "wave")
# In clothes that nobody of the cast wears.
OUTFIT = {
    "top": "hoodie", "top_colour": "orange", "trousers": "jeans", "trousers_colour": "black"
}  # fmt: skip


def main() -> None:
    if (PERSON, ACTION) not in split("test"):
        raise SystemExit(f"Person {PERSON}, action {ACTION} was trained on: choose another.")
    clip = render_clip(PERSON, ACTION, take=0)
    print(f"{write_clip(CLIP, clip.frames)}: {clip.caption}")
    who = dataclasses.replace(PERSONS[PERSON], **OUTFIT)
    still = render_clip(PERSON, WAVE, take=1001, frames=1, who=who)
    Image.fromarray(to_uint8(still.pixels[0])).save(PICTURE)
    print(f"{PICTURE}: {caption(who, WAVE)}")


if __name__ == "__main__":
    main()
