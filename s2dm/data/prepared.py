"""Prepared clips: what training needs of each clip, computed once and kept in a folder.

`clips.json` lists them; each has a safetensors file with its latents, its flow at full size, and
the states of its caption. Whoever prepares brings VAE and text encoder as functions, so either
engine can, and any trainer can read what the other one has prepared.

Every file is written whole or not at all. A clip that is there already, of the same source and
settings, isn't computed again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors, write_json
from ..flow import FlowField, estimate_flow
from ..flow.estimate import FlowModel, Progress
from ..flow.texture import clouds
from ..video import cover, read_clip, to_uint8
from ..video.frames import spread
from .clip import Clip
from .sets import ClipDataset
from .videos import find_clips, read_captions

FORMAT = 1
INDEX = "clips.json"
_EMPTY = "empty.safetensors"
_TRIAL_SIDE = 64
_PARTS = ("latents", "displacement", "occlusion", "text")


class ClipsError(ValueError):
    """Clips that can't be prepared or read; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Source:
    """A clip that is to be prepared.

    name: for messages.
    key: changes with whatever the clip is made from.
    load: reads the clip, and measures its flow.
    """

    name: str
    key: str
    load: Callable[[], Clip]


@dataclass(frozen=True)
class Encoders:
    """VAE and text encoder of the model that is to be trained.

    latents: (N,3,H,W) in [0,1] → (N,C,h,w), as the VAE gives them, without a scale.
    text: a caption → its states (L, width), as the U-Net reads them; as many for each caption.
    """

    latents: Callable[[Tensor], Tensor]
    text: Callable[[str], Tensor]

    def key(self) -> str:
        """Changes with the weights of either: of what they make of a picture and of no words."""
        made = (self.latents(clouds(1, _TRIAL_SIDE)), self.text(""))
        return _hash([(part.float().cpu() * 100).round().tolist() for part in made])


def folder_sources(
    folder: str | Path,
    frames: int,
    size: tuple[int, int],
    method: str | FlowModel = "dis",
    progress: Progress | None = None,
) -> list[Source]:
    """The clips of a folder: `wave.mp4`, or a folder `wave` of its frames, with `wave.txt` beside.

    Args:
        folder: of the clips; subfolders are looked through too.
        frames: of each clip, spread evenly from its first to its last.
        size: (height, width) that frames are scaled to cover, and cropped to at the centre.
        method, progress: see `estimate_flow`.

    Raises:
        ClipsError: no such folder, or no clip in it. ValueError: a clip without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "isn't there"
        raise ClipsError(f"expected a folder of clips, got {folder}, which {what}.")
    paths = find_clips(folder)
    if not paths:
        raise ClipsError(
            f"expected videos in {folder}, each with a text file of the same name beside it that "
            "says in a line what it shows (wave.mp4, wave.txt); got no video."
        )
    return [
        _file_source(path, caption, frames, size, method, progress)
        for path, caption in zip(paths, read_captions(paths), strict=True)
    ]


def _file_source(
    path: Path,
    caption: str,
    frames: int,
    size: tuple[int, int],
    method: str | FlowModel,
    progress: Progress | None,
) -> Source:
    def load() -> Clip:
        pixels, _ = read_clip(path, frames, size)
        return _with_flow(pixels, caption, method, progress)

    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return Source(path.name, _hash(states, caption, frames, size, _method_name(method)), load)


def frames_source(
    name: str,
    frames: Tensor,
    caption: str,
    count: int,
    size: tuple[int, int],
    method: str | FlowModel = "dis",
    progress: Progress | None = None,
) -> Source:
    """A clip whose frames (N,3,H,W) in [0,1] are at hand; arguments as in `folder_sources`."""
    frames = cover(frames[spread(len(frames), count)], *size)
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(to_uint8(frame).tobytes())
    key = _hash(digest.hexdigest(), tuple(frames.shape), caption, _method_name(method))
    return Source(name, key, lambda: _with_flow(frames, caption, method, progress))


def _with_flow(
    frames: Tensor, caption: str, method: str | FlowModel, progress: Progress | None
) -> Clip:
    """A clip with its flow. Raises ClipsError where there is none to learn from."""
    if (frames == frames[:1]).all():
        raise ClipsError(
            "expected a clip in which something moves, got one whose frames are all the same, or a "
            "single one. Take it out."
        )
    return Clip(frames, estimate_flow(frames, method, progress), caption)


def dataset_sources(clips: ClipDataset, key: str) -> Iterator[Source]:
    """The clips of a data set; `key` says which set, in which settings and files."""
    for number in range(len(clips)):
        yield Source(f"clip {number + 1}", _hash(key, number), lambda n=number: clips[n])


def prepare_clips(
    folder: str | Path,
    sources: Iterable[Source],
    total: int,
    encoders: Encoders,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedClips:
    """Prepare clips one after the other: no more than one of them is ever in memory.

    Args:
        folder: of the prepared clips; made if it isn't there. Clips in it that are not among the
            sources are dropped in the end.
        sources: the clips.
        total: how many there are, for `progress`.
        encoders: of the model that is to be trained.
        progress: called with (clips done, total) after each; may raise to stop.

    Raises:
        ClipsError: a clip can't be prepared, or the disk is full. What was prepared stays.
    """
    folder = Path(folder)
    entries: list[dict[str, Any]] = []
    weights = encoders.key()
    for number, source in enumerate(sources, 1):
        key = _hash(FORMAT, source.key, weights)
        path = folder / f"clip_{key}.safetensors"
        if not _is_whole(path):
            _write(path, source, encoders)
        if all(entry["file"] != path.name for entry in entries):  # the same clip twice
            entries.append({"file": path.name, "name": source.name})
        if progress is not None:
            progress(number, total)
    if not entries:
        raise ClipsError("expected at least one clip to prepare, got none.")
    empty = encoders.text("").half().cpu().contiguous()
    save_tensors(folder / _EMPTY, {"text": empty}, ClipsError)
    write_json(folder / INDEX, {"format": FORMAT, "clips": entries})
    kept = {entry["file"] for entry in entries}
    for path in folder.glob("clip_*.safetensors"):
        if path.name not in kept:
            path.unlink()
    return PreparedClips(folder)


def _write(path: Path, source: Source, encoders: Encoders) -> None:
    try:
        clip = source.load()
    except (ValueError, OSError) as error:
        raise ClipsError(f"{source.name}: can't be prepared: {error}") from error
    tensors = {
        "latents": encoders.latents(clip.pixels).half(),
        # In half-frames, as models see it: half precision is finest where motion is small.
        "displacement": clip.flow.condition(clip.flow.height, clip.flow.width)[:, :2].half(),
        "occlusion": (clip.flow.occlusion * 255).round().to(torch.uint8),
        "text": encoders.text(clip.caption).half(),
    }
    for name in ("latents", "text"):
        if not tensors[name].isfinite().all():
            raise ClipsError(
                f"{source.name}: expected finite {name}, got NaN or infinity. Check the VAE and "
                "the text encoder."
            )
    packed = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": str(FORMAT), "name": source.name, "caption": clip.caption}
    save_tensors(path, packed, ClipsError, metadata)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return set(_PARTS) <= set(file.keys())
    except (SafetensorError, OSError):
        return False


class PreparedClips:
    """The clips of a folder that `prepare_clips` filled. Nothing stays in memory but the captions.

    Raises:
        ClipsError: no prepared clips there, or files that are missing, damaged or don't fit one
            another.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text("utf-8"))
            files = [entry["file"] for entry in index["clips"]]
            version = index["format"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ClipsError(
                f"expected prepared clips in {self.folder}, got no {INDEX} that can be read "
                f"({error}). Prepare them again."
            ) from error
        if version != FORMAT or not files:
            raise ClipsError(
                f"{self.folder}: expected prepared clips of format {FORMAT}, got {len(files)} of "
                f"format {version!r}. Prepare them again."
            )
        # Only names: an index must not lead out of its folder.
        self.paths = [self.folder / Path(str(name)).name for name in files]
        headers = [_header(path) for path in self.paths]
        self.captions = [caption for caption, _ in headers]
        shapes = [shape for _, shape in headers]
        for path, shape in zip(self.paths, shapes, strict=True):
            if shape != shapes[0]:
                raise ClipsError(
                    f"{path}: expected {shapes[0]} as in the first clip, got {shape}. Prepare all "
                    "clips with the same settings and the same VAE and CLIP."
                )
        self.latent_shape: tuple[int, ...] = shapes[0]["latents"][1:]
        """(C, h, w)."""
        self.num_frames: int = shapes[0]["latents"][0]
        self.flow_size: tuple[int, int] = shapes[0]["displacement"][2:]
        """(height, width) of the flow in pixels."""
        self.empty_text = self._read(self.folder / _EMPTY, "text").float()
        """States of the empty prompt, (L, width)."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def key(self) -> str:
        """Of which clips these are, and how they were prepared."""
        return _hash([path.name for path in self.paths])

    def latents(self, clip: int, frames: Sequence[int] | None = None) -> Tensor:
        """Some frames of a clip, (n,C,h,w) float32, as the VAE gives them; all if None."""
        return self._read(self.paths[clip], "latents", frames).float()

    def text(self, clip: int) -> Tensor:
        """States of a clip's caption, (L, width) float32."""
        return self._read(self.paths[clip], "text").float()

    def flow(self, clip: int) -> FlowField:
        """The flow of a clip, at full size."""
        height, width = self.flow_size
        moved, hidden = self._motion(clip, None)
        half_frame = torch.tensor([width / 2, height / 2]).view(1, 2, 1, 1)
        return FlowField(moved * half_frame, hidden)

    def condition(self, clip: int, frames: Sequence[int], size: tuple[int, int]) -> Tensor:
        """What an adapter sees of some frames: (n,3,*size), as `FlowField.condition` gives it."""
        moved, hidden = self._motion(clip, frames)
        height, width = self.flow_size
        half_frame = torch.tensor([width / 2, height / 2]).view(1, 2, 1, 1)
        # Frame 1 leads every field: it is zero.
        still = moved.new_zeros(1, *moved.shape[1:]), hidden.new_zeros(1, *hidden.shape[1:])
        field = FlowField(torch.cat([still[0], moved * half_frame]), torch.cat([still[1], hidden]))
        return field.condition(*size)[1:]

    def _motion(self, clip: int, frames: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        path = self.paths[clip]
        hidden = self._read(path, "occlusion", frames).float() / 255
        return self._read(path, "displacement", frames).float(), hidden

    def _read(self, path: Path, name: str, frames: Sequence[int] | None = None) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                if frames is None:
                    return file.get_tensor(name)
                stored = file.get_slice(name)
                return torch.cat([stored[frame : frame + 1] for frame in frames])
        except (SafetensorError, OSError) as error:
            raise ClipsError(
                f"{path}: can't be read ({error}). Prepare the clips again."
            ) from error


def _header(path: Path) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Caption and shapes of a clip."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in _PARTS}
            caption = (file.metadata() or {}).get("caption", "")
    except (SafetensorError, OSError) as error:
        raise ClipsError(f"{path}: can't be read ({error}). Prepare the clips again.") from error
    latents, moved, hidden, text = (shapes[name] for name in _PARTS)
    good = (
        len(latents) == len(moved) == len(hidden) == 4
        and len(text) == 2
        and latents[0] == moved[0] == hidden[0]
        and moved[1] == 2
        and hidden == (moved[0], 1, *moved[2:])
        and 0 not in (*latents, *moved, *text)
    )
    if not good:
        raise ClipsError(
            f"{path}: expected latents (N,C,h,w), flow (N,2,H,W), occlusion (N,1,H,W) and text "
            f"(L,width), got {shapes}. Prepare the clips again."
        )
    return caption, shapes


def _method_name(method: str | FlowModel) -> str:
    return method if isinstance(method, str) else "model"


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
