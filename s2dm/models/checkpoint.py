"""The checkpoint format: one safetensors file whose metadata describe what is inside.

U-Net, text encoder and VAE lie under the usual keys of Stable Diffusion 1.x, so that a
full-size file opens as plain Stable Diffusion anywhere; our own parts have prefixes of their
own. The metadata entry `s2dm` is the JSON of an `S2DMConfig`. An adapter alone is the
same file without the Stable Diffusion parts.

Programs that save weights keep tensors and drop metadata that they don't know. So the JSON may
also ride as a tensor of bytes, `s2dm.config`; what else such a file holds is left alone.

Reading checks format version, keys, shapes and types from the file's header before a weight
is read, and that all weights are finite before anything is built from them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..settings import SettingsError
from .adapter import FlowAdapter
from .bert import check_wordpiece
from .config.adapter import AdapterTrainingConfig, FlowAdapterConfig
from .config.checkpoint import FORMAT_VERSION, S2DMConfig
from .config.sampling import SamplingConfig, ScheduleConfig
from .flow_generator import FlowGenerator
from .impostors import impostor, is_pickle
from .keys import (
    Key,
    Shape,
    bert_keys,
    own_keys,
    text_encoder_keys,
    unet_keys,
    vae_keys,
)
from .region_motion import RegionMotion
from .tokenizer import vocabulary

METADATA_KEY = "s2dm"
CONFIG_TENSOR = "s2dm.config"
"""Name of a uint8 tensor with the JSON of the config, read where the metadata are missing."""


class CheckpointError(ValueError):
    """A file that cannot be used: the message has its name, what was expected and a remedy."""


class Layout(NamedTuple):
    """Where a part lies in the file: the prefix of its keys, and the table of them for a config."""

    prefix: str
    keys: Callable[[Any], tuple[Key, ...]]


# A part has the name of its entry in S2DMConfig. A new part is one more row.
PARTS: dict[str, Layout] = {
    "unet": Layout("model.diffusion_model.", unet_keys),
    "text_encoder": Layout("cond_stage_model.transformer.", text_encoder_keys),
    "vae": Layout("first_stage_model.", vae_keys),
    "flow_adapter": Layout("s2dm.flow_adapter.", partial(own_keys, FlowAdapter)),
    "flow_generator": Layout("s2dm.flow_generator.", partial(own_keys, FlowGenerator)),
    "region_motion": Layout("s2dm.region_motion.", partial(own_keys, RegionMotion)),
    "flow_text_encoder": Layout("s2dm.flow_text_encoder.", bert_keys),
}

STAGE_2 = ("unet", "text_encoder", "vae", "flow_adapter")
"""The parts that make a clip from prompt and flow."""
STAGE_1 = ("flow_generator", "region_motion", "flow_text_encoder")
"""What makes the flow: the generator, together with text encoder and VAE unless the file holds
what LFDM's reads in their place."""

# A buffer that older tools save with the text encoder; it holds 0, 1, 2, ...
_IGNORED = {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
_FLOATS = {"F16", "BF16", "F32", "F64"}
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit
_CONFIG_LIMIT = 10_000_000  # bytes; a tokenizer of CLIP's size takes about one
# What a text or a nest of lists that is no JSON of ours ends in.
_NO_JSON = (ValueError, RecursionError)

_DAMAGED = "The metadata are damaged or of another version of S2DM: use the original, or update."

State = Mapping[str, Tensor]


class Part(NamedTuple):
    """One part of a checkpoint: its entry of the config, and its weights in the file's keys."""

    config: Any
    state: State


class Checkpoint:
    """Some parts of a model with what else is known of it: `checkpoint["unet"]` is a `Part`.

    Args:
        config: of the model. What `Checkpoint.config` keeps of it are these parts alone.
        states: for each part its weights under the ldm keys, without the part's prefix.

    Raises:
        CheckpointError: weights of a part that the config doesn't describe.
    """

    def __init__(self, config: S2DMConfig, states: Mapping[str, State]) -> None:
        unknown = [part for part in states if getattr(config, part, None) is None]
        if unknown:
            raise CheckpointError(
                f"expected weights for {_listed(parts_of(config))}, as the config says, got "
                f"{_listed(states)}."
            )
        absent: dict[str, Any] = {part: None for part in PARTS if part not in states}
        self.config = dataclasses.replace(config, **absent)
        self.states = dict(states)

    def __getitem__(self, part: str) -> Part:
        if part not in self.states:
            raise CheckpointError(
                f"expected a checkpoint with {part}, got one with {_listed(self.states)}."
            )
        return Part(getattr(self.config, part), self.states[part])

    def __contains__(self, part: str) -> bool:
        return part in self.states

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)


def load_checkpoint(
    path: str | Path, parts: Iterable[str] | None = None, optional: Iterable[str] = ()
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file.
        parts: names among `PARTS` to read; the others' weights are not touched.
            All parts of the file by default.
        optional: parts to read as well where the file has them.

    Returns:
        The parts, with their weights as stored.

    Raises:
        CheckpointError: if the file cannot be used or lacks one of `parts`.
    """
    path = Path(path)
    config = read_config(path)
    there = parts_of(config)
    wanted = there if parts is None else [*parts, *(part for part in optional if part in there)]
    lacking = [part for part in wanted if part not in there]
    if lacking:
        raise CheckpointError(
            f"{path.name}: expected a file with {_listed(lacking)}, got one with "
            f"{_listed(there)} alone. Choose a checkpoint that holds all of them."
        )
    states: dict[str, State] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for part in wanted:
                prefix = PARTS[part].prefix
                states[part] = {
                    name: file.get_tensor(prefix + name) for name in _shapes(config, part)
                }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name}: could not be read ({error}). Copy it again."
        ) from error
    for part, state in states.items():
        _check_finite(state, f"{path.name}: expected finite weights", PARTS[part].prefix)
    return Checkpoint(config, states)


def read_config(path: str | Path) -> S2DMConfig:
    """Read what a checkpoint says about itself, and check that its header agrees.

    Raises:
        CheckpointError: for all that `load_checkpoint` refuses, apart from weights that
            are not finite.
    """
    path = Path(path)
    header, start = _read_header(path)
    metadata = header.pop("__metadata__", None) or {}
    foreign = METADATA_KEY not in metadata
    text = _config_tensor(path, header, start) if foreign else metadata[METADATA_KEY]
    config = _parse_config(path.name, text, header)
    expected = {
        PARTS[part].prefix + name: shape
        for part in parts_of(config)
        for name, shape in _shapes(config, part).items()
    }
    got = {name: tuple(entry["shape"]) for name, entry in header.items() if name not in _IGNORED}
    if foreign:
        got = {name: shape for name, shape in got.items() if name in expected}
    _check_keys(path.name, expected, got)
    for name in expected:
        kind = header[name]["dtype"]
        if kind not in _FLOATS:
            raise CheckpointError(
                f"{path.name}: expected floating-point weights, got {kind} in '{name}'. "
                "Quantised files are not supported: use the original."
            )
    return config


def save_checkpoint(
    path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file; its folder is created. A file that is there is replaced.
        checkpoint: what to write.
        dtype: store the weights as this type, for example `torch.float16`.

    Raises:
        CheckpointError: if the weights are not those that the config describes, or not finite.
    """
    path = Path(path)
    config = checkpoint.config
    if not checkpoint.states:
        raise CheckpointError(f"{path.name}: not saved: expected at least one part, got none.")
    try:
        _check_tokenizer(config)
    except ValueError as error:
        raise CheckpointError(f"{path.name}: not saved: {error}") from error
    tensors: dict[str, Tensor] = {}
    for part, state in checkpoint.states.items():
        prefix = PARTS[part].prefix
        expected = {prefix + name: shape for name, shape in _shapes(config, part).items()}
        got = {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}
        _check_keys(path.name, expected, {n: s for n, s in got.items() if n not in _IGNORED})
        for name in _shapes(config, part):
            tensors[prefix + name] = state[name].detach().to("cpu", dtype).contiguous()
    _check_finite(tensors, f"{path.name}: not saved: expected finite weights")
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config.to_dict())}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def save_adapter(
    path: str | Path,
    config: FlowAdapterConfig,
    state: State,
    *,
    training: AdapterTrainingConfig,
    schedule: ScheduleConfig,
    resolution: tuple[int, int],
    frames: int,
    sampling: SamplingConfig | None = None,
    data: str = "",
    licence: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a flow adapter alone, for the model that it was trained for, whole or not at all.

    `load_checkpoint(path, ("flow_adapter",))` reads it again.

    Args:
        path: the file; its folder is created. A file that is there is replaced.
        config, state: of the adapter.
        training: the name of the model it was trained for, clips and steps.
        schedule: of that model, with its prediction type.
        resolution, frames: height and width in pixels, and frames of a clip in training.
        sampling: what the adapter recommends; the paper's settings if None.
        data, licence: free text for people.
        dtype: store the weights as this type, for example `torch.float16`.

    Raises:
        CheckpointError: if the weights are not those that the config describes, or not finite.
        SettingsError: if one of the values is out of its range.
    """
    whole = S2DMConfig(
        flow_adapter=config,
        schedule=schedule,
        sampling=sampling or SamplingConfig(),
        resolution=resolution,
        frames=frames,
        data=data,
        licence=licence,
        adapter_training=training,
    )
    save_checkpoint(path, Checkpoint(whole, {"flow_adapter": state}), dtype)


def parts_of(config: S2DMConfig) -> list[str]:
    """Names among `PARTS` that a config describes."""
    return [part for part in PARTS if getattr(config, part) is not None]


def _shapes(config: S2DMConfig, part: str) -> dict[str, Shape]:
    return {key.ldm: key.ldm_shape for key in PARTS[part].keys(getattr(config, part))}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the JSON header of a safetensors file, and tell what else the file may be.

    Returns:
        The header, and where in the file the weights begin.
    """
    again = "Download or copy it again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if start[8:] != b"{" or length > _HEADER_LIMIT:
                raise _not_safetensors(path, start)
            if 8 + length > size:
                raise CheckpointError(
                    f"{path.name}: truncated: expected at least {8 + length} bytes, got {size}. "
                    f"{again}"
                )
            text = start[8:] + file.read(length - 1)
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: could not be read ({error.strerror}): {path}"
        ) from error
    try:
        header = json.loads(text)
    except _NO_JSON:
        header = None
    if not _well_formed(header):
        raise CheckpointError(
            f"{path.name}: expected a safetensors header, got one that is damaged. {again}"
        )
    end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    if 8 + length + end > size:
        raise CheckpointError(
            f"{path.name}: truncated: expected {8 + length + end} bytes, got {size}. {again}"
        )
    return header, 8 + length


def _well_formed(header: Any) -> bool:
    """Whether this is a header as the safetensors format has it."""
    if not isinstance(header, dict):
        return False
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return False
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return all(
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_counts(entry.get("shape"))
        and _are_counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
        for entry in entries
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _not_safetensors(path: Path, start: bytes) -> CheckpointError:
    if found := impostor(path):
        return CheckpointError(f"{path.name}: expected a safetensors file, got {found}")
    if is_pickle(start):
        return CheckpointError(
            f"{path.name}: expected a safetensors file, got a pickle, which can run code when it "
            "is opened and is never loaded. Convert it first: s2dm convert."
        )
    return CheckpointError(
        f"{path.name}: expected a safetensors file, got something else. "
        "Choose an S2DM checkpoint, or download it again."
    )


def _config_tensor(path: Path, header: Mapping[str, Any], start: int) -> str | None:
    """The config that rides as a tensor, if there is one."""
    entry = header.get(CONFIG_TENSOR)
    if entry is None:
        return None
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "U8" or entry["shape"] != [end - begin] or end - begin > _CONFIG_LIMIT:
        raise CheckpointError(
            f"{path.name}: expected a JSON text in '{CONFIG_TENSOR}', got {entry['dtype']} of "
            f"shape {tuple(entry['shape'])}. {_DAMAGED}"
        )
    with path.open("rb") as file:
        file.seek(start + begin)
        return file.read(end - begin).decode("utf-8", "replace")


def _parse_config(name: str, text: str | None, header: Iterable[str]) -> S2DMConfig:
    if text is None:
        if any(key.startswith(PARTS["unet"].prefix) for key in header):
            raise CheckpointError(
                f"{name}: expected an S2DM checkpoint, got a Stable Diffusion one without S2DM "
                "metadata. If it is Stable Diffusion 1.x, load it with the ordinary checkpoint "
                "loader and apply a flow adapter."
            )
        raise CheckpointError(
            f"{name}: expected S2DM metadata in the file, got none. It is no S2DM checkpoint, or "
            "a tool has dropped the metadata: use the original file."
        )
    try:
        values = json.loads(text)
    except _NO_JSON as error:
        raise CheckpointError(f"{name}: expected JSON metadata, got {error}. {_DAMAGED}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{name}: expected a format version, got {version!r}. {_DAMAGED}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: expected format version {FORMAT_VERSION} or older, got {version}. "
            "Update S2DM to read this file."
        )
    try:
        config = S2DMConfig.from_dict(values)
        _check_tokenizer(config)
    except _NO_JSON as error:
        raise CheckpointError(f"{name}: {error} {_DAMAGED}") from error
    if not parts_of(config):
        raise CheckpointError(
            f"{name}: expected at least one of {list(PARTS)}, got none. {_DAMAGED}"
        )
    return config


def _check_tokenizer(config: S2DMConfig) -> None:
    if config.flow_text_encoder is not None:
        check_wordpiece(config.flow_tokenizer, config.flow_text_encoder)
    encoder, spec = config.text_encoder, config.tokenizer or {}
    if encoder is None or spec.get("kind") == "clip":
        return
    size = len(vocabulary(spec))
    if size != encoder.vocab_size:
        raise SettingsError(
            f"tokenizer: expected {encoder.vocab_size} tokens, as the text encoder has, got {size}."
        )


def _check_keys(name: str, expected: Mapping[str, Shape], got: Mapping[str, Shape]) -> None:
    remedy = "The file is damaged or was changed by another tool: use the original."
    missing = [key for key in expected if key not in got]
    if missing:
        raise CheckpointError(
            f"{name}: expected {len(expected)} weights, missing {_some(missing)}. {remedy}"
        )
    unexpected = [key for key in got if key not in expected]
    if unexpected:
        raise CheckpointError(
            f"{name}: expected {len(expected)} weights, got also {_some(unexpected)}. {remedy}"
        )
    for key, shape in expected.items():
        if got[key] != shape:
            raise CheckpointError(
                f"{name}: expected shape {shape} for '{key}', got {got[key]}. {remedy}"
            )


def _check_finite(state: Mapping[str, Tensor], expected: str, prefix: str = "") -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            raise CheckpointError(
                f"{expected}, got {tensor.dtype} in '{prefix}{name}'. Types of 8 bits can be "
                "stored as float16: s2dm convert --half."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{expected}, got NaN or infinity in '{prefix}{name}'. "
                "The training that made them diverged: use an earlier checkpoint."
            )


def _some(keys: list[str]) -> str:
    rest = len(keys) - 1
    return f"'{keys[0]}'" + (f" and {rest} more" if rest else "")


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts) or "nothing"
