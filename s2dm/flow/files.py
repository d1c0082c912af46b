"""Flow fields on disk: .npz for a whole field, a folder for one frame a file."""

from __future__ import annotations

import logging
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch

from ..files import in_order, replacing, replacing_folder
from .field import FlowError, FlowField
from .frame_files import LAYOUTS, SUFFIXES, read_frame, write_frame
from .inverse import from_previous, to_previous

logger = logging.getLogger(__name__)
_ARRAYS = ("displacement", "occlusion")
_ENCRYPTED = 1  # a bit of a zip member's flags
_DEFLATES_TO = 1032  # bytes at most that one byte of deflate's becomes
# What reading a zip archive and NumPy's format ends in, depending on where it is damaged.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)

MEASURED_TO = ("frame 1", "previous frame", "next frame")
_STILL = 1e-2  # pixels: an ST map of no motion, after rounding


def save_flow(
    path: str | Path,
    field: FlowField,
    precision: Literal["float16", "float32"] = "float32",
    layout: str = "flo",
) -> None:
    """Write a field: `name.npz`, `name.flo`, or a folder of numbered files.

    .npz holds displacement and occlusion, compressed; `precision` is for this format
    (float16 keeps a displacement to one part in 2048). A single .flo file is the second frame of a
    clip of two. A folder (any other name) has a file for every frame, the first included, in the
    order of their numbers, in one of the layouts of `frame_files`: "flo" (displacement alone),
    "kitti", "exr" or "st_map". Nothing is left half written: the result takes its name last.
    """
    path = Path(path)
    if precision not in ("float16", "float32"):
        raise FlowError(f"precision must be float16 or float32, got {precision!r}")
    if path.suffix.lower() == ".npz":
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                displacement=_to_numpy(field.displacement, precision),
                occlusion=_to_numpy(field.occlusion, precision),
            )
    elif path.suffix.lower() == ".flo":
        if field.num_frames != 2:
            raise FlowError(
                f"a .flo file holds one frame besides the first, got a field of {field.num_frames} "
                "frames: give a folder for a clip of another length, or use .npz"
            )
        with replacing(path) as temporary:
            _write_frame(temporary, "flo", field, 1)
    else:
        _save_folder(path, field, layout)


def load_flow(path: str | Path, measured_to: str = "frame 1") -> FlowField:
    """Read what `save_flow` writes, or .flo, KITTI or EXR files from elsewhere.

    measured_to: what the files of a folder say of each pixel. "frame 1": where it was in frame 1,
    one file a frame, as this project has it. Most tools write flow between neighbours instead, one
    file fewer than frames, and no file says what it is. "previous frame": where it was in the
    frame before, in files of frames 2 to N. "next frame": where it goes, in files of frames 1 to
    N - 1. Both are chained to frame 1. A folder whose first file isn't all zeros, as the flow of
    frame 1 is, is refused as flow to frame 1, and what is read is logged.

    Occlusion is 1 where a file says that the flow is unknown; .flo and vectors without A have no
    more than that.

    Raises FlowError, with the name of the file, for anything that isn't a whole and finite flow
    field. Pickled arrays are refused.
    """
    path = Path(path)
    if measured_to not in MEASURED_TO:
        raise FlowError(
            f"measured_to: expected one of {', '.join(MEASURED_TO)}, got {measured_to!r}."
        )
    if path.is_dir():
        return _load_folder(path, measured_to)
    if not path.is_file():
        raise FlowError(f"{path}: there is no such file or folder")
    if path.suffix.lower() == ".npz":
        return _load_npz(path)
    if path.suffix.lower() in SUFFIXES.values():
        frame = read_frame(path, forward=measured_to == "next frame")
        first = tuple(np.zeros_like(part) for part in frame)
        if measured_to == "next frame":
            return _chained(path, [frame], measured_to)
        return _stacked(path, [first, frame])
    raise FlowError(
        f"{path}: a flow field is a .npz file, a .flo file or a folder of .flo, .png or .exr "
        f"files, got a file that ends in {path.suffix or 'nothing'}"
    )


def _load_folder(path: Path, measured_to: str) -> FlowField:
    files = in_order(
        file for file in path.iterdir() if file.suffix.lower() in set(SUFFIXES.values())
    )
    if not files:
        raise FlowError(f"{path}: this folder holds no .flo files, nor .png or .exr ones")
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise FlowError(
            f"{path}: expected files of one kind, got {' and '.join(sorted(kinds))}. Keep what "
            "else there is in another folder."
        )
    frames = [read_frame(file, forward=measured_to == "next frame") for file in files]
    sizes = {frame[0].shape[1:] for frame in frames}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise FlowError(f"{path}: all frames of a clip have one size, got {listed}")
    if measured_to != "frame 1":
        return _chained(path, frames, measured_to)
    longest = float(np.abs(frames[0][0]).max())
    if not longest < _STILL:
        raise FlowError(
            f"{files[0]}: expected zeros, as the first file belongs to frame 1 and every file "
            "says where the pixels of its frame were in frame 1; got flow of up to "
            f"{longest:.3g} pixels. If this is flow between neighbouring frames, a file of zeros "
            'before it doesn\'t help: say that it is measured to the "previous frame" or the "next '
            'frame"'
        )
    frames[0] = (np.zeros_like(frames[0][0]), np.zeros_like(frames[0][1]))
    return _stacked(path, frames)


def _stacked(path: Path, frames: Sequence[tuple[np.ndarray, ...]]) -> FlowField:
    logger.info("%s: read as flow from each frame back to frame 1, not to the next frame", path)
    return _built(path, *(torch.from_numpy(np.stack(part)) for part in zip(*frames, strict=True)))


def _chained(path: Path, frames: Sequence[tuple[np.ndarray, ...]], measured_to: str) -> FlowField:
    logger.info("%s: read as flow to the %s, and chained to frame 1", path, measured_to)
    steps = [(torch.from_numpy(moved), torch.from_numpy(hidden)) for moved, hidden in frames]
    if not all(torch.isfinite(part).all() for step in steps for part in step):
        raise FlowError(f"{path}: expected finite values, got NaN or infinity.")
    return from_previous(to_previous(steps) if measured_to == "next frame" else steps)


def _load_npz(path: Path) -> FlowField:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.filelist}
            missing = set(_ARRAYS) - set(members)
            if missing:
                raise FlowError(
                    f"{path}: no flow field, expected the arrays displacement and occlusion, "
                    f"got {', '.join(sorted(members)) or 'none'}"
                )
            arrays = [_read_array(archive, members[name], f"{path}: {name}") for name in _ARRAYS]
    except FlowError:
        raise
    except _UNREADABLE as error:
        raise FlowError(f"{path}: truncated, or no .npz file of plain arrays ({error})") from error
    return _built(path, *(torch.from_numpy(array.astype(np.float32)) for array in arrays))


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> np.ndarray:
    """One array of an .npz file, whose size is checked before there is memory for it."""
    if member.flag_bits & _ENCRYPTED:
        raise FlowError(f"{name} is encrypted, expected a plain .npz file: save it again")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FlowError(
            f"{name} is compressed by method {member.compress_type}, expected one that NumPy "
            "writes: save it again with numpy.savez_compressed"
        )
    with archive.open(member) as file:
        shape, dtype = _read_npy_header(file)
        if dtype.kind != "f":
            raise FlowError(f"{name} must be floating point, got {dtype}")
        # A broken header may claim terabytes, and NumPy would ask for them at once.
        claimed = math.prod(shape) * dtype.itemsize
        if claimed >= member.file_size or claimed > _DEFLATES_TO * (member.compress_size + 1):
            raise FlowError(
                f"{name}: an array of shape {shape} has {claimed} bytes, which the file can't "
                "hold: it is damaged"
            )
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, from the version of the header that it has."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    shape, _, dtype = read(file)
    return shape, dtype


def _save_folder(folder: Path, field: FlowField, layout: str) -> None:
    if layout not in LAYOUTS:
        raise FlowError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")
    suffix = SUFFIXES[layout]
    if folder.is_file():
        raise FlowError(f"{folder}: the name must end in .npz or .flo, or be that of a folder")
    if folder.is_dir() and any(entry.suffix.lower() != suffix for entry in folder.iterdir()):
        raise FlowError(
            f"{folder}: this folder holds other files than {suffix}, and a clip replaces its "
            "folder; give a new name"
        )
    with replacing_folder(folder) as building:
        for index in range(len(field)):
            _write_frame(building / f"{index + 1:05d}{suffix}", layout, field, index)


def _write_frame(path: Path, layout: str, field: FlowField, index: int) -> None:
    displacement = _to_numpy(field.displacement[index], "float32")
    write_frame(path, layout, displacement, _to_numpy(field.occlusion[index, 0], "float32"))


def _built(path: Path, displacement: torch.Tensor, occlusion: torch.Tensor) -> FlowField:
    try:
        return FlowField(displacement, occlusion)
    except FlowError as error:
        raise FlowError(f"{path}: {error}") from error


def _to_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below, in plain words
        array = tensor.detach().cpu().numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise FlowError(f"displacements this long don't fit {dtype}: save as float32")
    return array
