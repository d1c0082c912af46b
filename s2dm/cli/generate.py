"""`s2dm generate`: a clip from a prompt, alone or with the motion of another clip."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    DEFAULT_CHECKPOINT,
    CommandError,
    add_sampling,
    check_exists,
    number,
    positive,
    rate,
    sampling_entries,
    size,
)

if TYPE_CHECKING:
    import torch

    from ..flow import FlowField


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a clip from a prompt, alone or with the motion of another clip",
        description="Make a clip that shows the prompt. It moves like a given clip, flow or pose; "
        "without one, the motion is made from the prompt too.",
    )
    parser.add_argument(
        "prompt", help='such as "A man, wearing a red coat and blue jeans is squat"'
    )
    motion = parser.add_mutually_exclusive_group()
    motion.add_argument(
        "--clip", type=Path, help="video, animation or folder of images to take motion from"
    )
    motion.add_argument(
        "--flow",
        type=Path,
        help="flow to follow: .npz of --save-flow, or a folder of numbered .flo files, each with "
        "the flow from its frame back to frame 1 (so the first is all zeros)",
    )
    motion.add_argument(
        "--pose",
        type=Path,
        help="keypoints of the largest person to follow: a folder of *_keypoints.json, as OpenPose "
        "writes them, with --size of the picture; or a .json file of all frames",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("s2dm.mp4"),
        help=".mp4, .gif, or a name without ending for a folder of PNG frames (%(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        help="S2DM checkpoint, or a folder of save_pretrained (the bundled one)",
    )
    parser.add_argument("--negative", default="", metavar="PROMPT", help="negative prompt")
    add_sampling(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument(
        "--sharing",
        choices=("shared", "independent", "mixed"),
        default="shared",
        help="how frames share their noise (%(default)s)",
    )
    parser.add_argument(
        "--share", type=number, default=0.5, help='common part in "mixed" (%(default)s)'
    )
    parser.add_argument(
        "--frames",
        type=positive,
        help="frames of the clip (those of the flow; else as many as the checkpoint was trained "
        "with, of a clip spread over it)",
    )
    parser.add_argument(
        "--size", type=size, metavar="WxH", help="size in pixels (the checkpoint's)"
    )
    parser.add_argument("--method", default="dis", help="flow estimator: dis or farneback")
    parser.add_argument("--save-flow", type=Path, metavar="FILE", help="keep the flow as .npz")
    parser.add_argument("--fps", type=rate, help="frames a second (those of the clip, or 8)")
    stage_1 = parser.add_argument_group("motion from the prompt (without --clip, --flow, --pose)")
    stage_1.add_argument(
        "--motion-strength",
        type=number,
        metavar="FACTOR",
        help="how much moves: 1 as much as the mean of the training clips, 0 little, not nothing "
        "(as the prompt has it)",
    )
    stage_1.add_argument("--flow-steps", type=positive, help="sampling steps of the flow (20)")
    stage_1.add_argument(
        "--flow-sampler",
        choices=("dpmpp_2m", "ddim", "lfdm"),
        help="sampler of the flow (dpmpp_2m); lfdm: as LFDM's own code samples",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="IMAGE",
        help="a picture that becomes frame 1; let the prompt describe it. Where frames are not "
        "anchored, only the motion that is made from the prompt starts from it",
    )
    parser.add_argument(
        "--chunk", type=positive, default=8, help="frames computed at a time (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (the best there is)")
    parser.add_argument(
        "--half", action="store_true", help="compute in float16: half the memory, for GPUs"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..models import FlowSampling
    from ..sector import NoiseSharing
    from ..video import DEFAULT_FPS, check_clip_path, read_image, write_clip

    check_clip_path(options.output)
    if options.save_flow is not None and options.save_flow.suffix.lower() != ".npz":
        raise CommandError(
            f"Can't keep the flow as {options.save_flow}. Give a name that ends in .npz."
        )
    from_prompt = all(way is None for way in (options.clip, options.flow, options.pose))
    stage_1 = {
        "--motion-strength": options.motion_strength,
        "--flow-steps": options.flow_steps,
        "--flow-sampler": options.flow_sampler,
    }
    given = [name for name, value in stage_1.items() if value is not None]
    if given and not from_prompt:
        raise CommandError(
            f"{given[0]} is for motion that is made from the prompt: leave it out, or leave out "
            "--clip, --flow and --pose."
        )
    pipeline = _load_pipeline(options, from_prompt)
    settings = {
        "negative_prompt": options.negative,
        "sampling": sampling_entries(options),
        "seed": options.seed,
        "noise_sharing": NoiseSharing(options.sharing, options.share),
        "chunk_size": options.chunk,
        "reference": None if options.reference is None else read_image(options.reference),
    }
    if from_prompt:
        width, height = options.size or (None, None)
        result = pipeline(
            options.prompt,
            options.frames,
            height=height,
            width=width,
            flow_sampling=FlowSampling(
                options.flow_steps or FlowSampling.steps,
                sampler=options.flow_sampler or FlowSampling.sampler,
                motion_strength=options.motion_strength,
            ),
            **settings,
        )
        flow, fps = result.flow, DEFAULT_FPS
    else:
        flow, fps, (height, width) = _given_flow(options, pipeline.config.s2dm_config or {})
        result = pipeline(options.prompt, flow, height=height, width=width, **settings)
    print(write_clip(options.output, result.frames, options.fps or fps))
    if options.save_flow is not None:
        from ..flow import save_flow

        save_flow(options.save_flow, flow)


def _given_flow(
    options: argparse.Namespace, settings: dict
) -> tuple[FlowField, float, tuple[int, int]]:
    """The flow of the clip or files that were given, its frame rate, and the size to generate."""
    from ..video import DEFAULT_FPS

    if options.clip is None:
        flow = _flow_of_pose(options) if options.flow is None else _flow_of_file(options)
        if options.frames is not None:
            flow = flow.retime(options.frames)
        width, height = options.size or (flow.width, flow.height)
        return flow, DEFAULT_FPS, (height, width)
    from ..flow import estimate_flow
    from ..video import read_clip

    height, width = settings.get("resolution", (512, 512))
    width, height = options.size or (width, height)
    frames = options.frames or settings.get("frames", 16)
    pictures, fps = read_clip(options.clip, frames=frames, size=(height, width))
    return estimate_flow(pictures, options.method), fps, (height, width)


def _flow_of_file(options: argparse.Namespace) -> FlowField:
    from ..flow import load_flow

    return load_flow(options.flow)


def _flow_of_pose(options: argparse.Namespace) -> FlowField:
    from ..flow import pose_flow
    from ..flow.openpose import poses, read_openpose

    found = poses(read_openpose(options.pose), *(options.size or (0, 0)))
    return pose_flow(found.keypoints, found.height, found.width)


def _load_pipeline(options: argparse.Namespace, from_prompt: bool):
    """The pipeline of two stages or of the second alone, on the device to compute on."""
    import torch

    checkpoint = options.checkpoint
    check_exists(checkpoint)
    device = options.device or _best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise CommandError(f"--device {device}: {str(error).splitlines()[0]}") from error
    from diffusers.utils import logging as diffusers_logging

    from ..pipelines import FlowToVideoPipeline, TextToVideoPipeline

    # It warns of the parts of a folder that the pipeline asked for has no use for.
    diffusers_logging.set_verbosity_error()
    kind = TextToVideoPipeline if from_prompt else FlowToVideoPipeline
    load = kind.from_pretrained if checkpoint.is_dir() else kind.from_single_file
    pipeline = load(checkpoint, torch_dtype=torch.float16 if options.half else torch.float32)
    return pipeline.to(device)


def _best_device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
