"""Make the moving picture that opens the README: what the checkpoint does, nothing selected.

    python tools/gallery.py

The clips are the first held-out ones in the order of `s2dm evaluate`, with the same noise: what it
measures first is what is shown here. Each column is one of them with its caption; the rows are
the clip itself, what the checkpoint makes of the caption and the flow of that clip, and what it
makes of the caption alone. It runs on the CPU, so that it comes out the same anywhere.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PACK = Path(__file__).resolve().parent.parent
sys.path.append(str(PACK))

from s2dm.cli.options import DEFAULT_CHECKPOINT, positive  # noqa: E402
from s2dm.data import build_dataset  # noqa: E402
from s2dm.evaluation.modes import ClipSampler, Variant  # noqa: E402
from s2dm.evaluation.run import shuffled  # noqa: E402
from s2dm.files import replacing  # noqa: E402
from s2dm.models import read_config  # noqa: E402
from s2dm.training.config import DataConfig  # noqa: E402
from s2dm.video import DEFAULT_FPS, to_uint8  # noqa: E402

ROWS = {
    "true": "given clip",
    "given-flow": "new clip with its motion",
    "two-stage": "new clip from the prompt alone",
}
SCALE = 2  # pixels of the picture a pixel of a clip
GAP, MARGIN, TEXT = 4, 8, 20
LARGEST = 2_000_000  # bytes that a page may ask of those who only look at it


Column = tuple[str, list[Tensor]]
"""A caption, and the clips (N,3,H,W) below it from top to bottom."""


def columns(checkpoint: Path, count: int) -> list[Column]:
    """The first `count` held-out clips, and what a checkpoint makes of each."""
    config = read_config(checkpoint)
    data = build_dataset(DataConfig(size=config.resolution[0], frames=config.frames), "test")
    generator = ClipSampler(checkpoint, config.sampling)
    made = []
    for index in shuffled(len(data))[:count]:
        clip = data[index]
        print(f"{index}: {clip.caption}", flush=True)
        # The noise that `s2dm evaluate` gives this clip for seed 0.
        column = [Variant(row).make(generator, clip, index).frames for row in ROWS]
        made.append((clip.caption, column))
    return made


def pictures(columns: Sequence[Column], rows: Sequence[str]) -> list[Image.Image]:
    """One picture for each moment, with every clip at that moment.

    Args:
        columns: with one clip for each row, all of one size and length.
        rows: what stands beside the rows.
    """
    frames, _, height, width = columns[0][1][0].shape
    cell = SCALE * width, SCALE * height
    font = ImageFont.load_default(TEXT)
    headings = [_wrapped(text, cell[0], font) for text, _ in columns]
    labels = [_wrapped(text, cell[0] // 2, font) for text in rows]
    left = MARGIN + max(_extent(text, font)[0] for text in labels) + MARGIN
    top = MARGIN + max(_extent(text, font)[1] for text in headings) + MARGIN
    across, down = cell[0] + GAP, cell[1] + GAP
    sheet = Image.new("RGB", (left + len(columns) * across, top + len(rows) * down), "white")
    draw = ImageDraw.Draw(sheet)
    for x, text in enumerate(headings):
        at = left + x * across, top - MARGIN
        draw.multiline_text(at, text, "black", font, anchor="ld")
    for y, text in enumerate(labels):
        middle = top + y * down + cell[1] // 2
        draw.multiline_text((MARGIN, middle), text, "black", font, anchor="lm")
    moments = []
    for moment in range(frames):
        picture = sheet.copy()
        for x, (_, clips) in enumerate(columns):
            for y, clip in enumerate(clips):
                frame = Image.fromarray(to_uint8(clip[moment]))
                frame = frame.resize(cell, Image.Resampling.LANCZOS)
                picture.paste(frame, (left + x * across, top + y * down))
        moments.append(picture)
    return moments


def write(path: Path, moments: Sequence[Image.Image], fps: float = DEFAULT_FPS) -> Path:
    """Write an animated WebP, which GitHub and every browser show.

    Raises:
        ValueError: it would be too large for a page.
    """
    first, *others = moments
    with replacing(path) as temporary:
        first.save(
            temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0,
            quality=85, method=6,
        )  # fmt: skip
        size = temporary.stat().st_size
        if size > LARGEST:
            raise ValueError(f"Expected at most {LARGEST} bytes, got {size}: show fewer clips.")
    return path


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """A text in lines of about so many pixels."""
    return "\n".join(textwrap.wrap(text, int(width / font.getlength("n"))))


def _extent(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a text in pixels, from where it is drawn."""
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    return tuple(map(math.ceil, ruler.multiline_textbbox((0, 0), text, font)[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--clips", type=positive, default=4, help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=PACK / "docs/images/gallery.webp")
    options = parser.parse_args()
    made = columns(options.checkpoint, options.clips)
    print(write(options.output, pictures(made, list(ROWS.values()))))


if __name__ == "__main__":
    main()
