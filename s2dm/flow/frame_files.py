"""One frame of flow a file: Middlebury .flo, KITTI's PNG, OpenEXR motion vectors and ST maps."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .field import FlowError

Array = NDArray[Any]

LAYOUTS = ("flo", "kitti", "exr", "st_map")
SUFFIXES = {"flo": ".flo", "kitti": ".png", "exr": ".exr", "st_map": ".exr"}

_FLO_MAGIC = b"PIEH"
_FLO_UNKNOWN = 1e9  # Middlebury writes longer displacements than this where flow is not known
_KITTI_ZERO, _KITTI_STEP = 2**15, 64  # what stands for no motion, and steps in a pixel
_LARGEST = 16384  # pixels of a side of an EXR file
_LAYERS = {True: "forward", False: "backward"}


def write_frame(path: Path, layout: str, displacement: Array, occlusion: Array) -> None:
    """Write one frame, (2,H,W) float32 in pixels and (H,W) in [0,1].

    flo: displacement alone, exact. kitti: 16 bits in steps of a 64th of a pixel, occluded pixels
    as not valid, with what is known of them. exr: "backward.u" and "backward.v", as compositors
    have them, v upwards. st_map: R and G, the place in frame 1 in [0,1] from the lower left
    corner; both with A, 1 where the pixel is visible.

    Raises FlowError: a layout that doesn't exist, a displacement that it can't hold, a library
    that is missing.
    """
    if layout == "flo":
        _write_flo(path, displacement)
    elif layout == "kitti":
        _write_kitti(path, displacement, occlusion)
    elif layout in ("exr", "st_map"):
        _write_exr(path, displacement, occlusion, layout == "st_map")
    else:
        raise FlowError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")


def read_frame(path: Path, forward: bool = False) -> tuple[Array, Array]:
    """Read one frame, (2,H,W) float32 and (1,H,W) float32; 1 where its flow is not known.

    forward: of an EXR file that has vectors both ways, take those to the next frame.
    """
    read = {".flo": _read_flo, ".png": _read_kitti}.get(path.suffix.lower())
    if read is not None:
        return read(path)
    if path.suffix.lower() == ".exr":
        return _read_exr(path, forward)
    raise FlowError(f"{path}: expected a .flo, .png or .exr file of flow.")


def _write_flo(path: Path, displacement: Array) -> None:
    """Magic, width and height as int32, then x and y of each pixel."""
    _, height, width = displacement.shape
    with open(path, "wb") as file:
        file.write(_FLO_MAGIC)
        np.array([width, height], dtype="<i4").tofile(file)
        displacement.astype("<f4").transpose(1, 2, 0).tofile(file)


def _read_flo(path: Path) -> tuple[Array, Array]:
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
    flow = data.transpose(2, 0, 1).astype(np.float32)
    # NaN is neither: it is left in, and refused.
    unknown = np.abs(flow).max(axis=0) > _FLO_UNKNOWN
    flow[:, unknown] = 0
    return flow, unknown[None].astype(np.float32)


def _write_kitti(path: Path, displacement: Array, occlusion: Array) -> None:
    cv2 = _opencv()
    steps = np.rint(displacement * np.float64(_KITTI_STEP) + _KITTI_ZERO)
    if steps.min() < 1 or steps.max() > 65535:
        raise FlowError(
            f"KITTI's files hold displacements of up to {_KITTI_ZERO // _KITTI_STEP} pixels, got "
            f"{np.abs(displacement).max():.5g}. Use another format."
        )
    valid = (occlusion < 0.5).astype(np.uint16)
    x, y = steps.astype(np.uint16)
    # OpenCV's order is blue, green, red; the file's is u, v, valid.
    done, data = cv2.imencode(".png", np.stack([valid, y, x], axis=-1))
    if not done:
        raise FlowError(f"{path}: OpenCV could not encode a 16-bit PNG.")
    path.write_bytes(data.tobytes())


def _read_kitti(path: Path) -> tuple[Array, Array]:
    cv2 = _opencv()
    data = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if len(data) else None
    if image is None or image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        kind = "no picture" if image is None else f"{image.dtype} of shape {image.shape}"
        raise FlowError(f"{path}: expected KITTI's flow, a PNG of three times 16 bits, got {kind}.")
    valid, y, x = image.transpose(2, 0, 1)
    flow = (np.stack([x, y]).astype(np.float32) - _KITTI_ZERO) / _KITTI_STEP
    unknown = valid == 0
    flow[:, unknown & (x == 0) & (y == 0)] = 0  # what KITTI itself writes there
    return flow, unknown[None].astype(np.float32)


def _write_exr(path: Path, displacement: Array, occlusion: Array, st_map: bool) -> None:
    exr = _openexr()
    visible = (1 - occlusion).astype(np.float32)
    if st_map:
        _, height, width = displacement.shape
        x = displacement[0].astype(np.float64) + np.arange(width)[None, :]
        y = displacement[1].astype(np.float64) + np.arange(height)[:, None]
        channels = {
            "R": (x + 0.5) / width,
            "G": 1 - (y + 0.5) / height,
            "B": np.zeros_like(x),
            "A": visible,
        }
    else:
        channels = {"backward.u": displacement[0], "backward.v": -displacement[1], "A": visible}
    header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
    plain = {name: np.ascontiguousarray(data, np.float32) for name, data in channels.items()}
    exr.File(header, plain).write(str(path))


def _read_exr(path: Path, forward: bool) -> tuple[Array, Array]:
    exr = _openexr()
    try:
        window = exr.File(str(path), header_only=True).header()["dataWindow"]
        sides = np.asarray(window[1]) - np.asarray(window[0]) + 1
        if not ((sides > 0) & (sides <= _LARGEST)).all():
            raise FlowError(f"{path}: expected up to {_LARGEST} pixels a side, got {sides}.")
        found = exr.File(str(path), separate_channels=True).channels()
        channels = {name: channel.pixels for name, channel in found.items()}
    except FlowError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, MemoryError) as error:
        raise FlowError(f"{path}: truncated, or no OpenEXR file ({error})") from error

    def channel(name: str) -> Array:
        return np.asarray(channels[name], np.float32)

    wanted = _LAYERS[forward]
    if f"{wanted}.u" in channels and f"{wanted}.v" in channels:
        flow = np.stack([channel(f"{wanted}.u"), -channel(f"{wanted}.v")])
    elif f"{_LAYERS[not forward]}.u" in channels:
        raise FlowError(
            f"{path}: expected {wanted}.u and {wanted}.v, got {_LAYERS[not forward]} vectors only. "
            "Say what they lead to: forward vectors lead to the next frame."
        )
    elif "R" in channels and "G" in channels:
        height, width = channels["R"].shape
        x = channel("R").astype(np.float64) * width - 0.5 - np.arange(width)[None, :]
        y = (1 - channel("G").astype(np.float64)) * height - 0.5 - np.arange(height)[:, None]
        flow = np.stack([x, y]).astype(np.float32)
    else:
        raise FlowError(
            f"{path}: expected motion vectors, {wanted}.u and {wanted}.v, or an ST map, R and G, "
            f"got the channels {', '.join(sorted(channels)[:12]) or 'none'}. Rename the channels "
            "to these."
        )
    visible = channel("A") if "A" in channels else np.ones(flow.shape[1:], np.float32)
    return flow, 1 - visible.clip(0, 1)[None]


def _opencv() -> ModuleType:
    try:
        import cv2
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise FlowError(
            f"KITTI's files need OpenCV, and it can't be imported ({error}). Run `pip install "
            "opencv-python-headless`, or use another format."
        ) from error
    return cv2


def _openexr() -> ModuleType:
    try:
        import OpenEXR
    except (ImportError, OSError) as error:
        raise FlowError(
            f"EXR files need the package OpenEXR, and it can't be imported ({error}). Run `pip "
            "install OpenEXR`, or use another format."
        ) from error
    if not hasattr(OpenEXR, "File"):
        raise FlowError("EXR files need OpenEXR 3.3 or newer. Run `pip install -U OpenEXR`.")
    return OpenEXR
