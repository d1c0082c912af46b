"""Flow fields on disk: .npz for a whole field, Middlebury .flo for one frame a file."""

from __future__ import annotations

import logging
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch

from ..files import in_order, replacing, replacing_folder
from .field import FlowError, FlowField

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

_FLO_MAGIC = b"PIEH"
_FLO_UNKNOWN = 1e9  # Middlebury writes longer displacements than this where flow is not known


def save_flow(
    path: str | Path, field: FlowField, precision: Literal["float16", "float32"] = "float32"
) -> None:
    """Write a field: `name.npz`, `name.flo`, or a folder of numbered .flo files.

    .npz holds displacement and occlusion, compressed; `precision` is for this format
    (float16 keeps a displacement to one part in 2048). .flo holds displacement alone: a single
    file is the second frame of a clip of two, a folder (any other name) has a file for every
    frame, the first included, in the order of their numbers. Nothing is left half written: the
    result takes its name last.
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
            _write_flo(temporary, field.displacement[1])
    else:
        _save_folder(path, field)


def load_flow(path: str | Path) -> FlowField:
    """Read what `save_flow` writes, or .flo files from elsewhere that mean the same.

    They have to hold backward flow to frame 1: the pixel p of frame i was at p + flow(p) in frame
    1. Most tools write the flow from each frame to the next one instead, one file fewer than
    frames, and no .flo file says what it is: a folder whose first file isn't all zeros, as the
    flow of frame 1 is, is refused, and what is read is logged. From .flo, occlusion is 0, and 1
    where the file says that the flow is unknown.

    Raises FlowError, with the name of the file, for anything that isn't a whole and finite flow
    field. Pickled arrays are refused.
    """
    path = Path(path)
    if path.is_dir():
        files = in_order(file for file in path.iterdir() if file.suffix.lower() == ".flo")
        if not files:
            raise FlowError(f"{path}: this folder holds no .flo files")
        flows = [_read_flo(file) for file in files]
        if flows[0].any():
            raise FlowError(
                f"{files[0]}: expected zeros, as the first file belongs to frame 1 and every file "
                "says where the pixels of its frame were in frame 1; got flow of up to "
                f"{np.abs(flows[0]).max():.3g} pixels. If this is flow from each frame to the "
                "next, a file of zeros before it doesn't help: estimate the flow from the frames "
                "themselves (estimate_flow, s2dm generate --clip)"
            )
        return _field_from_flo(path, flows)
    if not path.is_file():
        raise FlowError(f"{path}: there is no such file or folder")
    if path.suffix.lower() == ".npz":
        return _load_npz(path)
    if path.suffix.lower() == ".flo":
        flow = _read_flo(path)
        return _field_from_flo(path, [np.zeros_like(flow), flow])
    raise FlowError(
        f"{path}: a flow field is a .npz file, a .flo file or a folder of .flo files, "
        f"got a file that ends in {path.suffix or 'nothing'}"
    )


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


def _save_folder(folder: Path, field: FlowField) -> None:
    if folder.is_file():
        raise FlowError(f"{folder}: the name must end in .npz or .flo, or be that of a folder")
    if folder.is_dir() and any(entry.suffix.lower() != ".flo" for entry in folder.iterdir()):
        raise FlowError(
            f"{folder}: this folder holds other files than .flo, and a clip replaces its folder; "
            "give a new name"
        )
    with replacing_folder(folder) as building:
        for number, displacement in enumerate(field.displacement, start=1):
            _write_flo(building / f"{number:05d}.flo", displacement)


def _write_flo(path: Path, displacement: torch.Tensor) -> None:
    """One frame, (2,H,W): magic, width and height as int32, then x and y of each pixel."""
    _, height, width = displacement.shape
    with open(path, "wb") as file:
        file.write(_FLO_MAGIC)
        np.array([width, height], dtype="<i4").tofile(file)
        _to_numpy(displacement, "<f4").transpose(1, 2, 0).tofile(file)


def _read_flo(path: Path) -> np.ndarray:
    """One frame as (2,H,W) float32; unknown flow is left in."""
    with open(path, "rb") as file:
        if file.read(4) != _FLO_MAGIC:
            raise FlowError(f"{path}: no Middlebury .flo file, it doesn't begin with PIEH")
        header = file.read(8)
        width, height = np.frombuffer(header, "<i4").tolist() if len(header) == 8 else (0, 0)
        if width < 1 or height < 1:
            raise FlowError(f"{path}: the .flo header gives no valid size")
        # The size is checked before anything is read: a broken header may claim terabytes.
        expected, got = 12 + 8 * width * height, path.stat().st_size
        if got != expected:
            raise FlowError(
                f"{path}: a .flo file of {width}x{height} has {expected} bytes, got {got}: "
                + ("it is truncated" if got < expected else "something is appended")
            )
        data = np.frombuffer(file.read(), dtype="<f4").reshape(height, width, 2)
    return data.transpose(2, 0, 1).astype(np.float32)


def _field_from_flo(path: Path, flows: list[np.ndarray]) -> FlowField:
    sizes = {flow.shape[1:] for flow in flows}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise FlowError(f"{path}: all frames of a clip have one size, got {listed}")
    logger.info("%s: read as flow from each frame back to frame 1, not to the next frame", path)
    displacement = torch.from_numpy(np.stack(flows))
    unknown = (displacement.abs() > _FLO_UNKNOWN).any(dim=1, keepdim=True)
    return _built(path, displacement.masked_fill(unknown, 0.0), unknown.float())


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
