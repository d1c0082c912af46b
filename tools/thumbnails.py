"""Make the pictures that the template browser shows, from what the workflows really produce.

python tools/thumbnails.py COMFYUI
"""

import argparse
import tempfile
from pathlib import Path

import torch
from demo import PACK, pick, run
from PIL import Image

from s2dm.video import read_clip, to_uint8  # demo has put the pack on the path

# For each workflow the video that shows most, and how many pictures stand side by side in it.
VIDEOS = {
    "flow_to_video": ("side_by_side", 3),
    "shared_vs_independent_noise": ("shared_vs_independent_noise", 3),
    "text_to_video": ("flow_and_video", 2),
    "animate_reference": ("flow_and_animation", 2),
}
MOMENTS = 4
SIZE = 768  # pixels of the wider side


def thumbnail(video: Path, pictures: int) -> Image.Image:
    """A few moments from left to right, the pictures of the video one below the other."""
    frames, _ = read_clip(video, frames=MOMENTS)
    rows = [torch.cat(list(panel), dim=-1) for panel in frames.chunk(pictures, dim=-1)]
    picture = Image.fromarray(to_uint8(torch.cat(rows, dim=-2)))
    return picture.resize((SIZE, SIZE * picture.height // picture.width), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    arguments = parser.parse_args()
    for name, (prefix, pictures) in VIDEOS.items():
        workflow = PACK / "workflows" / f"{name}.json"
        with tempfile.TemporaryDirectory(prefix="s2dm-", ignore_cleanup_errors=True) as folder:
            files = run(arguments.comfyui, workflow, Path(folder))
            path = workflow.with_suffix(".jpg")
            thumbnail(pick(files, prefix), pictures).save(path, quality=90)
            print(path)


if __name__ == "__main__":
    main()
