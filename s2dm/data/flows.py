"""Where the flow of a recorded clip comes from: an estimator, a network, or a file beside it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..flow import FlowError, FlowField, estimate_flow, load_flow
from ..flow.estimate import METHODS, FlowModel, PairModel
from ..models import RegionMotion, load_checkpoint
from ..settings import SettingsError

FILES = "files"
_CHECKPOINT = ".safetensors"


def _torchvision(name: str) -> FlowModel:
    """A RAFT of torchvision with its published weights, which it fetches and keeps."""
    try:
        from torchvision.models import optical_flow
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"flow={name!r} needs torchvision, which is missing ({error}). Install it, or take "
            f"one of {', '.join(METHODS)}."
        ) from error
    return getattr(optical_flow, name)(weights="DEFAULT").eval()


NETWORKS: dict[str, Callable[[], FlowModel]] = {
    "raft_large": functools.partial(_torchvision, "raft_large"),
    "raft_small": functools.partial(_torchvision, "raft_small"),
}
"""Networks by name. They are loaded by the process that first needs one."""

_loaded: dict[str, FlowModel | PairModel] = {}


def check_source(source: str) -> None:
    """Refuse what `flow_of` doesn't know.

    Raises:
        SettingsError: another word, or a checkpoint that isn't there.
    """
    known = (*METHODS, *NETWORKS, FILES)
    if source.endswith(_CHECKPOINT):
        if not Path(source).is_file():
            raise SettingsError(f"flow: there is no checkpoint at {source}.")
    elif source not in known:
        raise SettingsError(
            f"flow must be one of {', '.join(known)}, or a {_CHECKPOINT} file with a region-motion "
            f"model, got {source!r}."
        )


def source_mark(source: str) -> str:
    """Another text when a checkpoint that estimates has changed; empty for other sources."""
    if not source.endswith(_CHECKPOINT):
        return ""
    state = os.stat(source)
    return f" flow {state.st_mtime_ns} {state.st_size}"


def _region_motion(path: str) -> PairModel:
    config, state = load_checkpoint(path, ("region_motion",))["region_motion"]
    model = RegionMotion(config)
    model.load_state_dict(dict(state))
    return model.float().eval()


def flow_of(source: str, frames: Tensor, path: Path, numbers: Sequence[int]) -> FlowField:
    """The flow of a clip, measured from its first frame.

    Args:
        source: an estimator, one of `NETWORKS`, or the path of a checkpoint with a region-motion
            model (`.safetensors`); or "files": the flow lies beside the clip as `NAME.npz` (see
            `s2dm.flow.load_flow`), for all frames of the recording.
        frames: (N,3,H,W) in [0,1], the frames of the clip.
        path: the recording.
        numbers: of these frames in the recording.

    Raises:
        CheckpointError: the checkpoint is broken, or holds no region-motion model.
        FlowError: the flow can't be estimated, or the file is missing, broken, or measured from
            another frame than the clip begins with.
    """
    if source == FILES:
        return _read(path, numbers, frames.shape[2:])
    method: Any = source
    if source not in METHODS:
        if source not in _loaded:
            make = NETWORKS.get(source)
            _loaded[source] = _region_motion(source) if make is None else make()
        method = _loaded[source]
    return estimate_flow(frames, method)


def flow_file(path: Path) -> Path:
    """Where the flow of a recording lies, for "files"."""
    return path.with_name((path.name if path.is_dir() else path.stem) + ".npz")


def _read(path: Path, numbers: Sequence[int], size: Sequence[int]) -> FlowField:
    file = flow_file(path)
    if not file.is_file():
        raise FlowError(
            f"{path} has no flow: expected {file}. Write it, or let it be estimated: "
            "data.options.flow=dis."
        )
    if numbers[0] != 0:
        raise FlowError(
            f"{file} is measured from frame 1 of the recording, and the clip begins with frame "
            f"{numbers[0] + 1}: take frame_sampling=even, or let the flow be estimated."
        )
    flow = load_flow(file)
    if max(numbers) >= flow.num_frames:
        raise FlowError(
            f"{file}: expected the flow of at least {max(numbers) + 1} frames, those of "
            f"{path.name}, got {flow.num_frames}."
        )
    return _covering(flow.select(list(numbers)), *size)


def _covering(flow: FlowField, height: int, width: int) -> FlowField:
    """Scaled to cover and cropped at the centre, as `s2dm.video.cover` does with frames."""
    factor = max(height / flow.height, width / flow.width)
    flow = flow.resize(
        max(height, round(flow.height * factor)), max(width, round(flow.width * factor))
    )
    return flow.crop(height, width, (flow.height - height) // 2, (flow.width - width) // 2)
