"""Conversion between checkpoint files, diffusers folders and pickled weights."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import replacing
from .models import PARTS, Checkpoint, FlowAdapter, S2DMConfig, load_checkpoint, save_checkpoint
from .models.checkpoint import METADATA_KEY
from .models.lfdm import PREFIX as LFDM_PREFIX
from .models.lfdm import from_lfdm, lfdm_config
from .models.presets import SD15
from .models.tokenizer import read_tokenizer

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
# What a folder of one of our pipelines holds and one of Stable Diffusion doesn't.
_FLOW = {"flow_adapter", "flow_generator"}


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
    - Stable Diffusion 1.x, as a diffusers folder, a `.safetensors` or a pickled file, to an S2DM
      checkpoint whose flow adapter is new: without effect, and ready for training
    - other pickled weights (`.ckpt`, `.pt`, `.pth`, `.bin`) to `.safetensors`, key by key
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
            for all that becomes a checkpoint or a folder, but LFDM's.

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
    pickled = source.is_file() and source.suffix.lower() in PICKLE_SUFFIXES
    plain = not pickled and _is_stable_diffusion(source)
    if (pickled or plain) and not to_file:
        raise ConversionError(
            f"{'Stable Diffusion becomes' if plain else 'Pickled weights become'} one file: give a "
            f"name that ends in .safetensors, not {target.name}."
        )
    if target.suffix and not to_file:
        raise ConversionError(
            f"Can't write {target.suffix}. Give a name that ends in .safetensors, or one without "
            "an ending for a diffusers folder."
        )
    dtype = torch.float16 if half else None
    if pickled:
        _unpickle(source, target, half, recommend)
        return
    if plain:
        read = _read_folder if source.is_dir() else load_file
        _add_adapter(read(source), source, target, half, recommend)
        return
    if source.is_file() and to_file:
        found = load_checkpoint(source)
        config = found.config.recommending(recommend or {})
        save_checkpoint(target, Checkpoint(config, found.states), dtype)
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
    from .pipelines import open_pipeline

    if source.is_file():
        return open_pipeline(source, _stored_type([source]))
    variant, files = _stored(source.glob("*/*"))
    return open_pipeline(source, _stored_type(files), variant=variant)


def _stored(files: Iterable[Path]) -> tuple[str | None, list[Path]]:
    """The variant of the weights in a folder of diffusers, and those that can be looked into."""
    weights = [file for file in files if file.suffix in (".safetensors", ".bin")]
    variant = "fp16" if weights and all(".fp16" in file.name for file in weights) else None
    if variant is None:
        weights = [file for file in weights if ".fp16" not in file.name]
    return variant, [file for file in weights if file.suffix == ".safetensors"]


def _stored_type(files: Iterable[Path]) -> torch.dtype:
    """The one type of all floating-point weights in these files, float32 where there are more."""
    stored = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            stored |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    kinds = {names.get(name, torch.float32) for name in stored if not name.startswith(("I", "U"))}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _is_stable_diffusion(source: Path) -> bool:
    """Whether a folder or a `.safetensors` file is Stable Diffusion without a flow adapter."""
    if source.is_dir():
        index = source / "model_index.json"
        return index.is_file() and not _FLOW & set(json.loads(index.read_text("utf-8")))
    try:
        with safe_open(source, framework="pt") as file:
            return METADATA_KEY not in (file.metadata() or {}) and _is_ldm(file.keys())
    except SafetensorError:
        return False  # whoever reads it as a checkpoint says what is wrong


def _is_ldm(names: Iterable[str]) -> bool:
    return any(name.startswith(PARTS["unet"].prefix) for name in names)


def _read_folder(source: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder of Stable Diffusion 1.x under the names of its one file."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from .pipelines.modules import text_encoder_state, unet_state, vae_state

    parts = {
        "unet": (UNet2DConditionModel, unet_state),
        "text_encoder": (CLIPTextModel, text_encoder_state),
        "vae": (AutoencoderKL, vae_state),
    }
    weights = {}
    for part, (kind, state) in parts.items():
        try:
            variant, files = _stored((source / part).glob("*"))
            network = kind.from_pretrained(
                source / part, variant=variant, torch_dtype=_stored_type(files)
            )
            named = state(network, getattr(SD15, part))
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_sd15(source, f"its {part}: {str(error).splitlines()[0]}") from error
        weights |= {PARTS[part].prefix + name: weight for name, weight in named.items()}
    return weights


def _add_adapter(
    weights: Mapping[str, Tensor],
    source: Path,
    target: Path,
    half: bool,
    recommend: Mapping[str, Any] | None,
) -> None:
    """Stable Diffusion 1.x, under the names of its one file, as a checkpoint with a new adapter."""
    states: dict[str, dict[str, Tensor]] = {}
    for part in ("unet", "text_encoder", "vae"):
        prefix, keys = PARTS[part]
        states[part] = {}
        for key in keys(getattr(SD15, part)):
            weight = weights.get(prefix + key.ldm)
            if weight is None or tuple(weight.shape) != key.ldm_shape:
                found = "nothing" if weight is None else tuple(weight.shape)
                raise _not_sd15(source, f"{key.ldm_shape} at {prefix + key.ldm}, found {found}")
            states[part][key.ldm] = weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        states["flow_adapter"] = FlowAdapter(SD15.flow_adapter).state_dict()
    config = dataclasses.replace(
        SD15,
        tokenizer=_tokenizer_of(source),
        data=f"Stable Diffusion from {source.name}, new flow adapter",
    )
    dtype = torch.float16 if half else None
    save_checkpoint(target, Checkpoint(config.recommending(recommend or {}), states), dtype)


def _tokenizer_of(source: Path) -> dict[str, Any]:
    """The tokenizer of a diffusers folder; CLIP's where there is none, as in a single file."""
    folder = source / "tokenizer"
    if not folder.is_dir():
        return SD15.tokenizer
    try:
        return read_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{error} Put Stable Diffusion's own files there, or delete the folder: CLIP's "
            "tokenizer is taken then."
        ) from error


def _not_sd15(source: Path, expected: str) -> ConversionError:
    return ConversionError(
        f"{source.name}: expected Stable Diffusion 1.x, {expected}. Other kinds, such as SDXL, 2.x "
        "or an inpainting model, can't follow flow here."
    )


def _unpickle(source: Path, target: Path, half: bool, recommend: Mapping[str, Any] | None) -> None:
    """Pickled weights to safetensors, with S2DM's metadata if the pickle holds them."""
    content = _read_pickle(source)
    weights = _weights_in(content)
    if _is_ldm(weights) and METADATA_KEY not in content:
        _add_adapter(weights, source, target, half, recommend)
        return
    if recommend:
        raise ConversionError(
            f"{source.name} holds pickled weights, which recommend no sampling. Convert them "
            "to .safetensors first, then set steps and guidance of that file."
        )
    diffusion = content.get("diffusion") if isinstance(content, dict) else None
    if isinstance(diffusion, dict) and any(str(name).startswith(LFDM_PREFIX) for name in diffusion):
        _convert_lfdm(diffusion, source, target, half)
        return
    if not weights:
        raise ConversionError(f"{source} holds no weights: expected tensors by name.")
    tensors = {
        name: tensor.to(torch.float16 if half and tensor.is_floating_point() else None)
        .contiguous()
        .clone()
        for name, tensor in weights.items()
    }
    metadata = {"format": "pt"}
    if METADATA_KEY in content:
        described = content[METADATA_KEY]
        metadata[METADATA_KEY] = described if isinstance(described, str) else json.dumps(described)
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
    save_checkpoint(target, Checkpoint(config, states), torch.float16 if half else None)


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
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
