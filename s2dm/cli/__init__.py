"""The command line, a file for each command: `s2dm generate | render | train | evaluate |
convert | reproduce`.

What is heavy (torch, diffusers) is imported by the command that needs it, when it runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import metadata

from . import convert, evaluate, generate, render, reproduce, train
from .options import DEFAULT_CHECKPOINT

__all__ = ["DEFAULT_CHECKPOINT", "leave_processes", "main"]


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
        extras = {"train": "training", "evaluate": "evaluation", "reproduce": "evaluation"}
        extra = extras.get(options.command, "standalone")
        print(
            f"s2dm {options.command}: the package {error.name} is missing. Install what the "
            f"command needs, in the folder of ComfyUI-S2DM: pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        # The library's own errors are ValueErrors whose message is meant for people, and a
        # training that diverges ends in a FloatingPointError.
        print(f"s2dm {options.command}: {error}", file=sys.stderr)
        return 1
    finally:
        leave_processes()
    return 0


def leave_processes() -> None:
    """Leave the other processes of `accelerate launch`, if there are any, before this one ends.

    One that only exits may be aborted by threads of the group that are still running.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s2dm",
        description="Video from a prompt, alone or with the motion of a clip (arXiv 2403.13408).",
    )
    parser.add_argument("--version", action="version", version=f"s2dm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, render, train, evaluate, convert, reproduce):
        command.add_to(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("s2dm-video")
    except metadata.PackageNotFoundError:
        return "(not installed, run from its folder)"
