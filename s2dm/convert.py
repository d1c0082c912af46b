"""Conversion between checkpoint files, diffusers folders and pickled weights."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import replacing
from .models import Checkpoint, FlowAdapter, S2DMConfig, load_checkpoint, save_checkpoint
from .models.bert import is_bert, read_bert
from .models.checkpoint import CONFIG_TENSOR, METADATA_KEY
from .models.impostors import impostor, is_pickle
from .models.lfdm import PREFIX as LFDM_PREFIX
from .models.lfdm import from_lfdm, lfdm_config
from .models.lfdm_region import from_lfdm_region, is_region_motion, region_motion_config
from .models.presets import SD15
from .models.spellings import SpellingError, holds_unet, spelled_our_way
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
    AssertionError,
    ArithmeticError,
    MemoryError,
    ImportError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
# Where training codes of this family put the weights inside what they pickle.
_NESTED = ("state_dict", "model", "module")
_TOKENIZERS = {"text_encoder": "tokenizer", "flow_text_encoder": "flow_tokenizer"}
# What a folder of one of our pipelines holds and one of Stable Diffusion doesn't.
_FLOW = {"flow_adapter", "flow_generator"}


class ConversionError(ValueError):
    """An input that can't be converted; the message says what was expected."""


def convert(
    source: str | Path,
    target: str | Path,
    half: bool = False,
    recommend: Mapping[str, Any] | None = None,
    beside: Sequence[str | Path] = (),
) -> None:
    """Convert `source` to `target`; their kinds are told by what they are and by the endings.

    - a diffusers folder (of `save_pretrained`) to an S2DM checkpoint `.safetensors`
    - an S2DM checkpoint `.safetensors` to a diffusers folder, or to another `.safetensors` with
      the same parts
    - Stable Diffusion 1.x, as a diffusers folder, a `.safetensors` or a pickled file, however its
      weights are named, to an S2DM checkpoint whose flow adapter is new: without effect, and ready
      for training
    - other pickled weights (`.ckpt`, `.pt`, `.pth`, `.bin`) to `.safetensors`, key by key
    - LFDM's pickled diffusion model (`flowdiff_*.pth`) to an S2DM checkpoint that holds the flow
      generator alone, its RegionMM (`RegionMM_*.pth`) to one with a region-motion model, a folder
      with BERT to one with the encoder that reads prompts for LFDM
    - an S2DM checkpoint or one of these three, with others `beside` it, to one checkpoint that
      holds the parts of all. LFDM makes the flow of a stage 2 in a file that has all three.

    Args:
        source: a file or folder.
        target: written under a temporary name first where it is a file.
        half: store the weights as float16; else they stay as they are.
        recommend: entries of `SamplingConfig` that the target recommends in place of the source's;
            for all that becomes a checkpoint or a folder, but LFDM's.
        beside: more to put into the target. Of two files with the same part the later one's stays.

    Raises:
        ConversionError: the two can't be converted into each other, or a pickle holds something
            else than weights. Code in a pickle is never run.
        CheckpointError: a checkpoint is broken.
        SettingsError: a recommendation is unknown or out of its range.
    """
    source, target = Path(source), Path(target)
    for path in (source, *map(Path, beside)):
        if not path.exists():
            raise ConversionError(f"There is nothing at {path}.")
    to_file = target.suffix.lower() == ".safetensors"
    if beside or (source.is_dir() and is_bert(source)):
        _join([source, *map(Path, beside)], target, half, recommend)
        return
    pickled = source.is_file() and _is_pickled(source)
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
        try:
            with safe_open(file, framework="pt") as weights:
                stored |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
        except (SafetensorError, OSError) as error:
            found = impostor(file) or "one that is damaged. Download or copy it again."
            raise ConversionError(f"{file}: expected a safetensors file, got {found}") from error
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    kinds = {names.get(name, torch.float32) for name in stored if not name.startswith(("I", "U"))}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _is_stable_diffusion(source: Path) -> bool:
    """Whether a folder or a `.safetensors` file is Stable Diffusion without a flow adapter."""
    if source.is_dir():
        from .pipelines import read_index

        return (source / "model_index.json").is_file() and not _FLOW & read_index(source).keys()
    try:
        with safe_open(source, framework="pt") as file:
            names = set(file.keys())
            described = METADATA_KEY in (file.metadata() or {}) or CONFIG_TENSOR in names
            return not described and holds_unet(names)
    except (SafetensorError, OSError):
        return False  # whoever reads it as a checkpoint says what is wrong


def _is_pickled(source: Path) -> bool:
    """Whether a file is a pickle, whatever its name says."""
    try:
        if found := impostor(source):
            raise ConversionError(f"{source.name}: expected weights, got {found}")
        with source.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ConversionError(f"{source}: could not be read ({error.strerror}).") from error
    named = source.suffix.lower() in PICKLE_SUFFIXES and start[8:] != b"{"
    return is_pickle(start) or named


def _read_folder(source: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder of Stable Diffusion 1.x, the part's name before each."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    parts = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    weights = {}
    for part, kind in parts.items():
        if not (source / part).is_dir():
            continue  # what is missing is said for all parts at once
        try:
            variant, files = _stored((source / part).glob("*"))
            network = kind.from_pretrained(
                source / part, variant=variant, torch_dtype=_stored_type(files)
            )
        except ConversionError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_sd15(source, f"its {part}: {str(error).splitlines()[0]}") from error
        weights |= {f"{part}.{name}": weight for name, weight in network.state_dict().items()}
    return weights


def _add_adapter(
    weights: Mapping[str, Tensor],
    source: Path,
    target: Path,
    half: bool,
    recommend: Mapping[str, Any] | None,
) -> None:
    """Stable Diffusion 1.x, in any spelling, as a checkpoint with a new adapter."""
    try:
        states = spelled_our_way(weights, SD15)
    except SpellingError as error:
        raise _not_sd15(source, str(error)) from error
    # Weights that share memory, as in some pickles, can't be saved.
    states = {
        part: {name: _alone(weight) for name, weight in state.items()}
        for part, state in states.items()
    }
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


def _alone(weight: Tensor) -> Tensor:
    """The weight, in memory that holds nothing else."""
    return weight if weight.untyped_storage().nbytes() == weight.nbytes else weight.clone()


def _not_sd15(source: Path, found: str) -> ConversionError:
    return ConversionError(
        f"{source.name}: expected Stable Diffusion 1.x, {found}. Other models, such as SDXL, 2.x "
        "or one for inpainting, can't be converted."
    )


def _unpickle(source: Path, target: Path, half: bool, recommend: Mapping[str, Any] | None) -> None:
    """Pickled weights to safetensors, with S2DM's metadata if the pickle holds them."""
    content = _read_pickle(source)
    weights = _weights_in(content)
    if holds_unet(weights) and METADATA_KEY not in content:
        _add_adapter(weights, source, target, half, recommend)
        return
    if recommend:
        raise ConversionError(
            f"{source.name} holds pickled weights, which recommend no sampling. Convert them "
            "to .safetensors first, then set steps and guidance of that file."
        )
    if lfdm := _lfdm_parts(content, source):
        save_checkpoint(target, lfdm, torch.float16 if half else None)
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


def _lfdm_parts(content: Any, source: Path) -> Checkpoint | None:
    """What LFDM pickles, its diffusion model or RegionMM, as a checkpoint of that part."""
    diffusion = content.get("diffusion") if isinstance(content, dict) else None
    config: Any
    try:
        if isinstance(diffusion, dict) and any(str(n).startswith(LFDM_PREFIX) for n in diffusion):
            what, part, config = "diffusion model", "flow_generator", lfdm_config(diffusion)
            weights = from_lfdm(diffusion, config)
        elif is_region_motion(content):
            what, part, config = "RegionMM", "region_motion", region_motion_config(content)
            weights = from_lfdm_region(content, config)
        else:
            return None
    except ValueError as error:
        raise ConversionError(f"{source}: expected LFDM's {what} as published. {error}") from error
    described: dict[str, Any] = {part: config}
    if part == "flow_generator":
        described["frames"] = config.frames
    data = f"LFDM's weights (arXiv 2303.13744) from {source.name}"
    return Checkpoint(S2DMConfig(data=data, **described), {part: weights})


def _join(
    sources: Sequence[Path], target: Path, half: bool, recommend: Mapping[str, Any] | None
) -> None:
    """The parts of several files as one checkpoint, described as the one with a U-Net is."""
    if target.suffix.lower() != ".safetensors":
        raise ConversionError(
            f"Several inputs become one file: give a name that ends in .safetensors, not "
            f"{target.name}."
        )
    found = [_parts(source) for source in sources]
    lead = next((one for one in found if "unet" in one), found[0])
    described: dict[str, Any] = {}
    states: dict[str, Mapping[str, Tensor]] = {}
    for one in found:
        described |= {part: getattr(one.config, part) for part in one}
        for encoder, tokenizer in _TOKENIZERS.items():
            if encoder in one:
                described[tokenizer] = getattr(one.config, tokenizer)
        states |= one.states
    told = dict.fromkeys(one.config.data for one in found if one.config.data)
    config = dataclasses.replace(lead.config, **described, data="; ".join(told))
    save_checkpoint(
        target,
        Checkpoint(config.recommending(recommend or {}), states),
        torch.float16 if half else None,
    )


def _parts(source: Path) -> Checkpoint:
    """A checkpoint of ours, LFDM's models and BERT, all as checkpoints."""
    if source.is_dir() and is_bert(source):
        try:
            config, tokenizer, weights = read_bert(source, _read_weights)
        except ValueError as error:
            raise ConversionError(f"{source}: expected BERT as published. {error}") from error
        described = S2DMConfig(
            flow_text_encoder=config, flow_tokenizer=tokenizer, data=f"BERT from {source.name}"
        )
        return Checkpoint(described, {"flow_text_encoder": weights})
    if source.is_file() and _is_pickled(source):
        if lfdm := _lfdm_parts(_read_pickle(source), source):
            return lfdm
    elif source.is_file() and not _is_stable_diffusion(source):
        return load_checkpoint(source)
    raise ConversionError(
        f"{source.name}: expected an S2DM checkpoint, LFDM's weights or a folder with BERT to put "
        "together. Convert it to a checkpoint by itself first."
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_pickle(source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # Not torch's own words: they advise to load without this protection.
        if held := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConversionError(
                f"{source.name} holds Python objects beside the weights ({held[1]}), which could "
                "run code and are not loaded. Ask its author for a .safetensors file."
            ) from error
        raise ConversionError(
            f"{source.name} could not be read as pickled weights: it is truncated or damaged, or "
            "of another kind. Download it again."
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
