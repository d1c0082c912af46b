"""Conversion between checkpoint files, diffusers folders and pickled weights."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import S2DMConfig, load_checkpoint, read_config, save_checkpoint
from .models.checkpoint import METADATA_KEY
from .models.lfdm import PREFIX as LFDM_PREFIX
from .models.lfdm import from_lfdm, lfdm_config

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


def convert(
    source: str | Path,
    target: str | Path,
    half: bool = False,
    recommend: Mapping[str, Any] | None = None,
) -> None:
    """Convert `source` to `target`; their kinds are told by what they are and by the endings.

    - a diffusers folder (of `save_pretrained`) to an S2DM checkpoint `.safetensors`
    - an S2DM checkpoint `.safetensors` to a diffusers folder, or to another `.safetensors` with
      the same parts
    - pickled weights (`.ckpt`, `.pt`, `.pth`, `.bin`) to `.safetensors`, key by key
    - LFDM's pickled diffusion model (`flowdiff_*.pth`) to an S2DM checkpoint that holds the flow
      generator alone. It is LFDM's network, with LFDM's inputs and outputs: features of LFDM's own
      encoder as reference, BERT's embedding as prompt, and in place of displacement and
      occlusion the position that a pixel comes from and 1 where it is *visible*. So it can't
      join a stage 2 as it is: it is a start for training, and for comparison.

    Args:
        source: a file or folder.
        target: written under a temporary name first where it is a file.
        half: store the weights as float16; else they stay as they are.
        recommend: entries of `SamplingConfig` that the target recommends in place of the source's;
            for a checkpoint or a diffusers folder.

    Raises:
        ConversionError: the two can't be converted into each other, or a pickle holds something
            else than weights. Code in a pickle is never run.
        CheckpointError: a checkpoint is broken.
        ConfigError: a recommendation is unknown or out of its range.
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
        if recommend:
            raise ConversionError(
                f"{source.name} holds pickled weights, which recommend no sampling. Convert them "
                "to .safetensors first, then set steps and guidance of that file."
            )
        _unpickle(source, target, half)
        return
    if target.suffix and not to_file:
        raise ConversionError(
            f"Can't write {target.suffix}. Give a name that ends in .safetensors, or one without "
            "an ending for a diffusers folder."
        )
    dtype = torch.float16 if half else None
    if source.is_file() and to_file:
        config, states = load_checkpoint(source)
        save_checkpoint(target, config.recommending(recommend or {}), states, dtype)
        return
    pipeline = _load(source)
    if recommend:
        config = S2DMConfig.from_dict(pipeline.config.s2dm_config).recommending(recommend)
        pipeline.register_to_config(s2dm_config=config.to_dict())
    if to_file:
        pipeline.save_single_file(target, dtype)
    else:
        if half:
            pipeline.to(torch.float16)
        pipeline.save_pretrained(target)


def _load(source: Path) -> Any:
    """The pipeline of a folder or file, of both stages if it holds both."""
    from .pipelines import FlowToVideoPipeline, TextToVideoPipeline

    if source.is_file():
        both = read_config(source).flow_generator is not None
        return (TextToVideoPipeline if both else FlowToVideoPipeline).from_single_file(source)
    index = source / "model_index.json"
    if not index.is_file():
        raise ConversionError(f"{source} is no diffusers folder: it has no model_index.json.")
    both = "flow_generator" in json.loads(index.read_text("utf-8"))
    return (TextToVideoPipeline if both else FlowToVideoPipeline).from_pretrained(source)


def _unpickle(source: Path, target: Path, half: bool) -> None:
    """Pickled weights to safetensors, with S2DM's metadata if the pickle holds them."""
    from safetensors.torch import save_file

    from .video import replacing

    content = _read_pickle(source)
    diffusion = content.get("diffusion") if isinstance(content, dict) else None
    if isinstance(diffusion, dict) and any(str(name).startswith(LFDM_PREFIX) for name in diffusion):
        _convert_lfdm(diffusion, source, target, half)
        return
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


def _convert_lfdm(diffusion: dict[str, Tensor], source: Path, target: Path, half: bool) -> None:
    generator = lfdm_config(diffusion)
    try:
        weights = from_lfdm(diffusion, generator)
    except ValueError as error:
        raise ConversionError(
            f"{source}: expected LFDM's diffusion model as published. {error}"
        ) from error
    config = S2DMConfig(
        flow_generator=generator,
        frames=generator.frames,
        data=f"LFDM's weights (arXiv 2303.13744) from {source.name}",
    )
    states = {"flow_generator": weights}
    save_checkpoint(target, config, states, torch.float16 if half else None)


def _read_pickle(source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{source} could not be read as plain weights ({first_line}). It is damaged, or it "
            "holds Python objects beside the weights, which could run code and are not loaded. "
            "Ask its author for a .safetensors file."
        ) from error


def _weights_in(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    for name in _NESTED:
        if isinstance(content.get(name), dict):
            return _weights_in(content[name])
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
