"""Prepared clips on disk, so that a training step touches only small arrays.

A cache folder holds, for every clip of a data set: the frames (uint8), the flow condition
(float16, at the size that the flow adapter wants) and the caption; and, for each VAE, the latents
(float16). Filling is resumable: a `done` array says which clips are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..data import Clip, ClipDataset, DataConfig, build_dataset
from ..files import read_json_lines, write_text
from ..flow import estimate_flow
from ..models import FlowAdapterConfig
from ..settings import to_dict
from .config import TrainingConfig
from .schedule import draw_frames

logger = logging.getLogger(__name__)

CONDITION_SIZE = FlowAdapterConfig(fusion="channel").condition_size(0, 0)
"""Height and width that the tokens of a flow adapter's grid are made of, for any latents."""

Arrays = tuple[int, np.ndarray, np.ndarray, str, bool]
"""Number of a clip, its frames, its flow condition, its caption, and whether it is elsewhere."""


class ClipError(ValueError):
    """A clip can't be prepared; the message says which, why, and what to do."""


class _Prepared(Dataset):
    """The clips of a data set as the arrays that the cache stores, or why there are none.

    An error is handed on as text: what a loader makes of one that is raised in a worker is a
    traceback.
    """

    def __init__(
        self,
        clips: ClipDataset,
        estimated_flow: float = 0.0,
        condition_size: tuple[int, int] = CONDITION_SIZE,
    ) -> None:
        self.clips = clips
        self.estimated_flow = estimated_flow
        self.condition_size = condition_size

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Arrays | str:
        try:
            return self._arrays(index)
        except (ValueError, OSError, MemoryError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            return f"Clip {index + 1} of {len(self)} can't be prepared: {why}"

    def _arrays(self, index: int) -> Arrays:
        clip = clip_to_prepare(self.clips, index)
        frames = clip.pixels
        share = self.estimated_flow
        estimated = int((index + 1) * share) > int(index * share)
        flow = estimate_flow(frames) if estimated else clip.flow
        condition = flow.condition(*self.condition_size).half().numpy()
        pixels = (frames * 255).round().to(torch.uint8).numpy()
        return index, pixels, condition, clip.caption, clip.elsewhere


def clip_to_prepare(clips: ClipDataset, index: int) -> Clip:
    """A clip with all frames that training may draw."""
    return clips.pool(index) if hasattr(clips, "pool") else clips[index]


class ClipCache:
    """Frames (C,N,3,H,W) uint8, conditions (C,N,3,h,w) float16 and captions of C clips.

    `elsewhere` (C,) bool is what the clips say of themselves. With `choices` above 1, N frames are
    frame 1 and as many of each later interval, which `draw` chooses from.
    """

    def __init__(self, folder: Path, choices: int = 1) -> None:
        self.folder, self.choices = folder, choices
        self.frames = np.load(folder / "frames.npy", mmap_mode="r")
        self.conditions = np.load(folder / "conditions.npy", mmap_mode="r")
        self.captions: list[str] = json.loads((folder / "captions.json").read_text("utf-8"))
        path = folder / "elsewhere.npy"  # older caches have none, nor such clips
        self.elsewhere = np.load(path) if path.exists() else np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def length(self) -> int:
        """Frames of a draw, which is what a clip is for a model."""
        return 1 + (self.frames.shape[1] - 1) // self.choices

    def draw(self, generator: torch.Generator) -> list[int]:
        """Which of a clip's frames are one draw of it: frame 1, and one out of each interval."""
        return draw_frames(self.length, self.choices, generator)

    @property
    def parts(self) -> list[list[int]]:
        """Draws that together have every frame once, but for frame 1, which each has."""
        stored = self.frames.shape[1]
        return [[0, *range(1 + one, stored, self.choices)] for one in range(self.choices)]

    def pixels(self, clip: int, frames: Any = slice(None)) -> Tensor:
        """Frames of a clip, or parts of them by any index, float32 in [0,1]."""
        return torch.from_numpy(self.frames[clip][frames].copy()).float() / 255


def cache_folder(
    root: str | Path,
    data: DataConfig,
    split: str,
    fingerprint: str | None = None,
    condition_size: tuple[int, int] = CONDITION_SIZE,
) -> Path:
    """Where the clips of a split are cached.

    With other settings, files or conditions of another size: in another folder.
    """
    values = to_dict(data)
    values.pop("validation_split")
    values["split"] = split
    if fingerprint is not None:
        values["fingerprint"] = fingerprint
    if condition_size != CONDITION_SIZE:
        values["condition_size"] = condition_size
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    return Path(root) / f"{data.name}-{split}-{key}"


def build_clip_cache(
    root: str | Path,
    data: DataConfig,
    split: str | None = None,
    workers: int = 0,
    condition_size: tuple[int, int] = CONDITION_SIZE,
) -> ClipCache:
    """Render or read every clip of the split once, with `workers` processes, and cache it."""
    split = split or data.split
    clips = build_dataset(data, split)
    fingerprint = getattr(clips, "fingerprint", None)
    choices = getattr(clips, "choices", 1)
    folder = cache_folder(root, data, split, fingerprint, condition_size)
    if (folder / "captions.json").exists():
        return ClipCache(folder, choices)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = _Prepared(clips, data.estimated_flow, condition_size)
    count = len(prepared)
    ((_, frames, condition, _, _),) = _load(prepared, [0], workers=0)
    frame_store = _open(folder / "frames.npy", (count, *frames.shape), np.uint8)
    condition_store = _open(folder / "conditions.npy", (count, *condition.shape), np.float16)
    elsewhere_store = _open(folder / "elsewhere.npy", (count,), np.bool_)
    done = _open(folder / "done.npy", (count,), np.bool_)
    lines = folder / "captions.part.jsonl"
    captions = dict(read_json_lines(lines)) if lines.exists() else {}
    write_text(lines, "".join(json.dumps(line) + "\n" for line in captions.items()))
    done[[index for index in range(count) if index not in captions]] = False
    todo = np.flatnonzero(~done).tolist()
    loaded = _load(prepared, todo, workers)
    with lines.open("a", encoding="utf-8") as file:
        title = f"caching {split} clips"
        for index, frames, condition, caption, elsewhere in _bar(loaded, len(todo), title):
            frame_store[index], condition_store[index] = frames, condition
            elsewhere_store[index] = elsewhere
            file.write(json.dumps([index, caption]) + "\n")
            file.flush()
            captions[index] = caption
            done[index] = True
    for store in (frame_store, condition_store, elsewhere_store, done):
        store.flush()
    write_text(folder / "captions.json", json.dumps([captions[i] for i in range(count)]))
    return ClipCache(folder, choices)


def training_clips(
    config: TrainingConfig,
    split: str | None = None,
    condition_size: tuple[int, int] = CONDITION_SIZE,
) -> ClipCache:
    """The clips of a run, cached where its settings say; by default those it trains on."""
    root = config.cache or Path(config.output) / "cache"
    return build_clip_cache(root, config.data, split, config.workers, condition_size)


def build_latent_cache(
    cache: ClipCache, key: str, encode: Callable[[Tensor], Tensor], device: torch.device
) -> np.ndarray:
    """Latents (C,N,c,h,w) float16 of every cached frame; `encode` maps (N,3,H,W) in [0,1].

    key: names all that makes the latents; others have a file of their own.
    """
    path = cache.folder / f"latents-{key}.npy"
    first = encode(cache.pixels(0).to(device))
    store = _open(path, (len(cache), *first.shape), np.float16)
    done = _open(path.with_suffix(".done.npy"), (len(cache),), np.bool_)
    todo = np.flatnonzero(~done).tolist()
    for index in _bar(todo, len(todo), "encoding clips"):
        store[index] = encode(cache.pixels(index).to(device)).half().cpu().numpy()
        done[index] = True
    store.flush()
    return np.load(path, mmap_mode="r")


def clip_latents(
    cache: ClipCache, vae: nn.Module, scale: float, device: torch.device, half: bool
) -> np.ndarray:
    """Latents of every cached frame on the scale that the U-Net sees, in bfloat16 if `half`.

    A retrained encoder gets latents of its own, and a retrained decoder keeps those there are.
    """
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    @torch.no_grad()
    def encode(frames: Tensor) -> Tensor:
        frames = (frames * 2 - 1).contiguous(memory_format=torch.channels_last)
        with autocast:
            latents = vae.encode(frames).latent_dist.mode()
        return latents.float() * scale

    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    key = f"{weights_hash(encoder)}-{scale:g}-{'bf16' if half else 'float32'}"
    return build_latent_cache(cache, key, encode, device)


def weights_hash(model: nn.Module) -> str:
    """A short hash of a model's weights."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Open an array file for writing, or start one of zeros."""
    if path.exists():
        return np.lib.format.open_memmap(path, mode="r+")
    size, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"{path} takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there. Make "
            "room, or give another folder: --set cache=FOLDER."
        )
    store = np.lib.format.open_memmap(path, mode="w+", shape=shape, dtype=dtype)
    if hasattr(os, "posix_fallocate"):  # else a disk that fills up later ends the process
        try:
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()  # the next attempt would take it for reserved
            raise
    return store


def _load(prepared: _Prepared, indices: list[int], workers: int) -> Iterator[Arrays]:
    """Prepare clips, in so many other processes; 0 for this one."""
    loader = DataLoader(
        Subset(prepared, indices), batch_size=None, num_workers=workers, worker_init_fn=_one_thread
    )
    with _opencv_without_threads() if workers else nullcontext():
        try:
            for arrays in loader:
                if isinstance(arrays, str):
                    raise ClipError(arrays)
                yield arrays
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ClipError(
                f"A process that prepares clips was ended ({error}), most often because memory ran "
                "out. The same command goes on from there; use fewer processes: --set workers=1, "
                "or 0."
            ) from error


@contextmanager
def _opencv_without_threads() -> Iterator[None]:
    """Stop OpenCV's threads. In a process that was forked beside them it waits for them for ever.

    They start with the first flow that is estimated, whoever asked for it.
    """
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _one_thread(worker: int) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _bar(items: Any, total: int, title: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc=title, mininterval=5.0)
