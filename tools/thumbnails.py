"""Make the pictures that the template browser shows, from what the workflows really produce.

python tools/thumbnails.py COMFYUI

Every frame of a clip is shown, so that nothing that goes wrong in one of them is left out.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from demo import CLIP, PACK, pick, run, shown
from PIL import Image

from s2dm.video import read_clip, to_uint8  # demo has put the pack on the path

# What stands at the left of each workflow's video: the given clip, the flow, the picture that it
# starts from, or nothing, where the video shows two clips itself.
BESIDE = {
    "flow_to_video": "clip",
    "shared_vs_independent_noise": None,
    "text_to_video": "flow",
    "animate_picture": "flow",
    "video_to_video": "clip",
    "draw_motion": "picture",
    "camera_move": "picture",
    "motion_transfer": "clip",
    "train_adapter": "clip",
    "use_adapter": "clip",
}
COLUMNS = 4  # of the frames of one clip
GAP = 4
SIZE = 768  # pixels of the wider side


def thumbnail(clips: list[torch.Tensor]) -> Image.Image:
    """All frames of two clips, (N, 3, H, W) each, as two blocks side by side."""
    blocks = []
    for frames in clips:
        lines = [torch.cat(list(line), dim=-1) for line in frames.split(COLUMNS)]
        blocks.append(torch.nn.functional.pad(torch.cat(lines, dim=-2), (GAP,) * 4, value=1.0))
    picture = Image.fromarray(to_uint8(torch.cat(blocks, dim=-1)))
    return picture.resize((SIZE, SIZE * picture.height // picture.width), Image.Resampling.LANCZOS)


def clips(name: str, files: list[Path]) -> list[torch.Tensor]:
    """The two clips of a workflow's thumbnail, from the files of its run."""
    video, _ = read_clip(pick(files, name))
    if BESIDE[name] is None:
        return list(video.chunk(2, dim=-1))
    if BESIDE[name] == "picture":  # once, as large as all frames together
        large = torch.nn.functional.interpolate(video[:1], scale_factor=COLUMNS, mode="bilinear")
        return [large, video]
    given = shown(files) if BESIDE[name] == "flow" else read_clip(CLIP)[0][: len(video)]
    return [given, video]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    arguments = parser.parse_args()
    for name in BESIDE:
        workflow = PACK / "workflows" / f"s2dm_{name}.json"
        with tempfile.TemporaryDirectory(prefix="s2dm-", ignore_cleanup_errors=True) as folder:
            files = run(arguments.comfyui, workflow, Path(folder))
            path = workflow.with_suffix(".jpg")
            thumbnail(clips(name, files)).save(path, quality=90)
            print(path)


if __name__ == "__main__":
    main()
