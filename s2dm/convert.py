"""Conversion between checkpoint files, diffusers folders and pickled weights."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models.checkpoint import METADATA_KEY

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
# What unpickling raises, depending on where the bytes stop making sense.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
)
# Where training codes of this family put the weights inside what they pickle.
_NESTED = ("state_dict", "model", "module")


class ConversionError(ValueError):
    """An input that can't be converted; the message says what was expected."""


def convert(source: str | Path, target: str | Path, half: bool = False) -> None:
    """Convert `source` to `target`; their kinds are told by what they are and by the endings.

    - a diffusers folder (of `save_pretrained`) to an S2DM checkpoint `.safetensors`
    - an S2DM checkpoint `.safetensors` to a diffusers folder, or to another `.safetensors`
    - pickled weights (`.ckpt`, `.pt`, `.pth`, `.bin`) to `.safetensors`, key by key

    Args:
        source: a file or folder.
        target: written under a temporary name first where it is a file.
        half: store the weights as float16.

    Raises:
        ConversionError: the two can't be converted into each other, or a pickle holds something
            else than weights. Code in a pickle is never run.
        CheckpointError: a checkpoint is broken.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise ConversionError(f"There is nothing at {source}.")
    to_file = target.suffix.lower() == ".safetensors"
    if source.is_file() and source.suffix.lower() in PICKLE_SUFFIXES:
        if not to_file:
            raise ConversionError(
                f"Pickled weights become one file: give a name that ends in .safetensors, not "
                f"{target.name}."
            )
        _unpickle(source, target, half)
        return
    if target.suffix and not to_file:
        raise ConversionError(
            f"Can't write {target.suffix}. Give a name that ends in .safetensors, or one without "
            "an ending for a diffusers folder."
        )
    from .pipelines import FlowToVideoPipeline

    dtype = torch.float16 if half else None
    if source.is_dir():
        if not (source / "model_index.json").is_file():
            raise ConversionError(f"{source} is no diffusers folder: it has no model_index.json.")
        pipeline = FlowToVideoPipeline.from_pretrained(source)
    else:
        pipeline = FlowToVideoPipeline.from_single_file(source)
    if to_file:
        pipeline.save_single_file(target, dtype)
    else:
        if half:
            pipeline.to(torch.float16)
        pipeline.save_pretrained(target)


def _unpickle(source: Path, target: Path, half: bool) -> None:
    """Pickled weights to safetensors, with S2DM's metadata if the pickle holds them."""
    from safetensors.torch import save_file

    from .video import replacing

    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{source} could not be read as plain weights ({first_line}). It is damaged, or it "
            "holds Python objects beside the weights, which could run code and are not loaded. "
            "Ask its author for a .safetensors file."
        ) from error
    weights = _weights_in(content)
    if not weights:
        raise ConversionError(f"{source} holds no weights: expected tensors by name.")
    tensors = {
        name: tensor.to(torch.float16 if half and tensor.is_floating_point() else None)
        .contiguous()
        .clone()
        for name, tensor in weights.items()
    }
    metadata = {"format": "pt"}
    if isinstance(content, dict) and METADATA_KEY in content:
        described = content[METADATA_KEY]
        metadata[METADATA_KEY] = described if isinstance(described, str) else json.dumps(described)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _weights_in(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    for name in _NESTED:
        if isinstance(content.get(name), dict):
            return _weights_in(content[name])
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
