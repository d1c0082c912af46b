"""Flow from frames: OpenCV's DIS and Farneback, or any RAFT-like model.

The yardstick for generated clips as well as the source of conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .field import FlowError, FlowField
from .geometry import pixel_grid, resample, sample_at
from .texture import clouds

METHODS = ("dis", "farneback")

Progress = Callable[[int, int], None]
FlowModel = Callable[[Tensor, Tensor], "Tensor | list[Tensor]"]


_OPENCV_SIDES = (32, 256)  # pixels: below the first, OpenCV fails; below the second, we double
_MODEL_SIDE = 128  # below, RAFT's pyramid of correlations turns to NaN
_TRIAL_SHIFT = (6, -4)  # pixels (x, y) by which a picture is moved to try a model
_TRIAL_ERROR = 1.5  # pixels by which the model may be wrong there
_WINDOW = 7  # pixels over which candidates are compared
_STILL = 4 / 255
_STILL_BONUS = 0.5 / 255  # how much worse "no motion" may match and still be taken


@runtime_checkable
class PairModel(Protocol):
    """A model that knows by itself what frame 1 hides, such as `models.RegionMotion`."""

    def estimate_pair(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Displacement (2,H,W) in pixels and occlusion (1,H,W) in [0,1] of `frame` since `first`.

        Both (3,H,W) in [0,1], any size.
        """


class _Estimator(Protocol):
    """Estimates the frames of one clip, in order."""

    def __call__(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Backward flow (2,H,W), frame to first, and occlusion (1,H,W)."""

    def still(self, frame: Tensor) -> None:
        """Told instead of asked about a frame that equals the first."""


def estimate_flow(
    frames: Tensor,
    method: str | FlowModel | PairModel = "dis",
    progress: Progress | None = None,
) -> FlowField:
    """Backward flow from every frame to the first one, as S2DM conditions on it (section 3.3).

    frames: (N,3,H,W) in [0,1], any N >= 1 and any size.
    method: "dis", "farneback" (both need OpenCV), or a RAFT-like model: called with two image
        batches (B,3,h,w) in [-1,1], what torchvision's `raft_large` wants, with h and w at
        least 128 and multiples of 8; returns the flow from the first to the second image in
        pixels, (B,2,h,w), or a list of refinements of which the last counts. Modules get images
        on their device and in their dtype. It is tried on a known shift first. Or a `PairModel`,
        which gives soft occlusion.
    progress: called with (frames done, N).

    Occlusion comes from the forward-backward check, that of a `PairModel` from itself. A frame that
    equals the first up to noise gets exactly zero flow. Frames are taken pair by pair, so memory
    doesn't grow with N beyond the result. Raises FlowError for bad frames, a missing OpenCV or a
    model that returns something else than that shift.
    """
    _check_frames(frames)
    estimator = _make_estimator(method)
    count, _, height, width = frames.shape
    displacement = torch.zeros(count, 2, height, width)
    occlusion = torch.zeros(count, 1, height, width)
    first = frames[0].detach().float().cpu()
    if progress is not None:
        progress(1, count)
    for index in range(1, count):
        frame = frames[index].detach().float().cpu()
        if _is_still(first, frame):
            estimator.still(frame)
        else:
            displacement[index], occlusion[index] = estimator(first, frame)
        if progress is not None:
            progress(index + 1, count)
    return FlowField(displacement, occlusion)


class _OpenCVTracker:
    """DIS or Farneback from OpenCV, followed from frame to frame.

    OpenCV alone loses a limb that moves further than it is wide. So the flow of frame i starts
    from that of frame i-1, carried on by the small step between the two, and each pixel then
    takes the best of three by colour: this chain, OpenCV's own refinement of it against frame 1,
    and no motion (a still background doesn't drift).

    Mean end-point error over mean motion, on the pixels of 12 held-out puppet clips that move by
    more than half a pixel and that frame 1 shows (128x128, 16 frames, mean motion 4.5 pixels):
    plain DIS 0.57, plain DIS on doubled pictures 0.49, tracked DIS 0.33, tracked Farneback 0.40.
    Occlusion: recall 0.66, precision 0.32 (Farneback 0.62 and 0.30); other bounds, and a bound
    on the colour difference, do no better.
    """

    def __init__(self, method: str) -> None:
        self._cv2 = _import_cv2()
        self._method = method
        self._previous: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        height, width = first.shape[1:]
        # Doubled, thin limbs are told apart from what lies beside them. Enlarged further, DIS
        # gains nothing and Farneback sees only smooth slopes and misses the motion.
        least, small = _OPENCV_SIDES
        side = min(height, width)
        scale = max(2 if side < small else 1, ceil(least / side))
        first, frame = (_enlarged(image, height * scale, width * scale) for image in (first, frame))
        if self._previous is None:
            still = torch.zeros_like(first[:2])
            self._previous = (first, still, still)
        last, backward, forward = self._previous
        grid = pixel_grid(first.shape[1], first.shape[2], first)

        step = self._flow(frame, last)
        chain = step + sample_at(backward, grid + step)
        backward = self._best(frame, first, chain, grid)

        step = self._flow(last, frame)
        chain = forward + sample_at(step, grid + forward)
        forward = self._best(first, frame, chain, grid)

        self._previous = (frame, backward, forward)
        return _checked(_shrunk(backward, height, width), _shrunk(forward, height, width))

    def still(self, frame: Tensor) -> None:
        """Frame equals the first one: the chain starts anew."""
        self._previous = None

    def _best(self, source: Tensor, target: Tensor, chain: Tensor, grid: Tensor) -> Tensor:
        """For each pixel of `source`, the candidate whose surroundings match `target` best."""
        chain = _kept_inside(chain, grid)
        refined = _kept_inside(self._flow(source, target, chain), grid)
        candidates = torch.stack([torch.zeros_like(chain), chain, refined])
        seen = sample_at(target.expand(3, -1, -1, -1), grid + candidates)
        cost = (seen - source).abs().mean(dim=1, keepdim=True)
        cost = F.avg_pool2d(cost, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
        cost[0] -= _STILL_BONUS
        return candidates.gather(0, cost.argmin(dim=0, keepdim=True).expand(1, 2, -1, -1))[0]

    def _flow(self, source: Tensor, target: Tensor, start: Tensor | None = None) -> Tensor:
        """Flow from source to target, (2,h,w), begun at `start`."""
        grey = [_grey(image) for image in (source, target)]
        begun = None if start is None else np.ascontiguousarray(start.permute(1, 2, 0).numpy())
        if self._method == "dis":
            dis = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            dis.setFinestScale(0 if min(grey[0].shape) < 2 * _OPENCV_SIDES[1] else 1)
            flow = dis.calc(*grey, begun)
        else:
            flags = self._cv2.OPTFLOW_FARNEBACK_GAUSSIAN
            if begun is not None:
                flags |= self._cv2.OPTFLOW_USE_INITIAL_FLOW
            flow = self._cv2.calcOpticalFlowFarneback(*grey, begun, 0.5, 4, 15, 5, 5, 1.1, flags)
        return torch.from_numpy(np.nan_to_num(flow)).permute(2, 0, 1)


class _ModelEstimator:
    """A RAFT-like model, pair by pair: frame i against frame 1."""

    def __init__(self, model: FlowModel) -> None:
        self._model = model
        self._tried = False

    def __call__(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        if not self._tried:
            _try_out(self._model)
            self._tried = True
        height, width = first.shape[1:]
        scale = max(1.0, _MODEL_SIDE / min(height, width))
        size = [ceil(side * scale / 8) * 8 for side in (height, width)]
        flow = _ask(self._model, resample(torch.stack([frame, first]), *size) * 2 - 1)
        return _checked(*(_shrunk(direction, height, width) for direction in flow))

    def still(self, frame: Tensor) -> None:
        """Nothing to do: pairs don't depend on one another."""


class _PairEstimator:
    """A model of pairs that knows occlusion."""

    def __init__(self, model: PairModel) -> None:
        self._model = model

    def __call__(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.estimate_pair(first, frame)

    def still(self, frame: Tensor) -> None:
        """Nothing to do: pairs don't depend on one another."""


def _ask(model: FlowModel, pair: Tensor) -> Tensor:
    """A model's flow from each of two images (2,3,h,w) to the other, (2,2,h,w)."""
    parameter = next(iter(getattr(model, "parameters", tuple)()), None)
    if parameter is not None:
        pair = pair.to(parameter)
    with torch.no_grad():
        flow = model(pair, pair.flip(0))
    if isinstance(flow, (list, tuple)) and flow:
        flow = flow[-1]
    if not isinstance(flow, Tensor) or tuple(flow.shape) != (2, 2, *pair.shape[2:]):
        got = tuple(flow.shape) if isinstance(flow, Tensor) else type(flow).__name__
        raise FlowError(
            f"flow model: expected to return (B,2,H,W), here {(2, 2, *pair.shape[2:])}, or a list "
            f"of such, got {got}. Use a RAFT-like model."
        )
    flow = flow.float().cpu().contiguous()  # the median of an expanded tensor is NaN
    if not torch.isfinite(flow).all():
        raise FlowError("flow model: expected finite flow, got NaN or infinity. Try it in float32.")
    return flow


def _try_out(model: FlowModel) -> None:
    """Refuse a model that doesn't measure a known shift: RAFT is published in many conventions.

    They differ in the range of the pictures, the unit of the flow, its direction and its order.
    """
    x, y = _TRIAL_SHIFT
    side, margin = _MODEL_SIDE, max(map(abs, _TRIAL_SHIFT))
    canvas = clouds(1, side + 2 * margin)[0]
    first, second = (
        canvas[:, top : top + side, left : left + side]
        for top, left in ((margin, margin), (margin - y, margin - x))
    )
    pair = torch.stack([first, second])

    def measured(low: float, high: float) -> Tensor:
        return _ask(model, low + (high - low) * pair).flatten(2).median(dim=2).values

    def right(found: Tensor) -> bool:
        there, back = found - found.new_tensor([_TRIAL_SHIFT, (-x, -y)])
        return max(there.norm(), back.norm()) <= _TRIAL_ERROR

    try:
        found = measured(-1, 1)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, (FlowError, torch.cuda.OutOfMemoryError)):
            raise
        raise FlowError(
            f"flow model: expected to take images (2,3,{side},{side}) in [-1,1], got "
            f"{type(error).__name__}: {error}. Use a RAFT-like model."
        ) from error
    if right(found):
        return
    other = [f"[{low},{high}]" for low, high in ((0, 1), (0, 255)) if right(measured(low, high))]
    hint = f"; it wants images in {other[0]}, and gets them in [-1,1]" if other else ""
    raise FlowError(
        f"flow model: expected a flow of ({x}, {y}) pixels for an image shifted by that, and "
        f"({-x}, {-y}) back, got ({found[0, 0]:.3g}, {found[0, 1]:.3g}) and "
        f"({found[1, 0]:.3g}, {found[1, 1]:.3g}){hint}. Use a model with torchvision's "
        "conventions, such as its raft_large with trained weights, or the method dis."
    )


def _make_estimator(method: str | FlowModel | PairModel) -> _Estimator:
    if isinstance(method, str):
        if method not in METHODS:
            raise FlowError(
                f"method: expected one of {', '.join(METHODS)} or a flow model, got {method!r}."
            )
        return _OpenCVTracker(method)
    if isinstance(method, PairModel):
        return _PairEstimator(method)
    if not callable(method):
        raise FlowError(f"method: expected a flow model to call, got {type(method).__name__}.")
    return _ModelEstimator(method)


def _import_cv2() -> ModuleType:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise FlowError(
            "the methods dis and farneback need OpenCV, and it can't be imported "
            f"({error}). Run `pip install opencv-python-headless`, or give a flow model."
        ) from error
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # A library is missing on this machine, or it was built for another NumPy.
        raise _broken_opencv((str(error).strip() or repr(error)).splitlines()[0]) from error
    if not hasattr(cv2, "DISOpticalFlow_create"):
        # Python takes any folder of this name for a package.
        place = getattr(cv2, "__file__", None) or ", ".join(getattr(cv2, "__path__", ()))
        raise _broken_opencv(f"{place} is not all of it")
    return cv2


def _broken_opencv(reason: str) -> FlowError:
    return FlowError(
        "the methods dis and farneback need OpenCV, and the one that is installed doesn't work "
        f"({reason}). Run `python install.py` in the pack's folder with the Python of ComfyUI, "
        "which mends it or says what to do, and restart; or give a flow model."
    )


def _check_frames(frames: Tensor) -> None:
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise FlowError(f"frames: expected a tensor of floats in [0, 1], got {got}.")
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise FlowError(
            f"frames: expected (N,3,H,W) with at least one frame and one pixel, "
            f"got {tuple(frames.shape)}."
        )
    if not torch.isfinite(frames).all():
        raise FlowError(
            "frames: expected finite values, got NaN or infinity. Check the node or file that "
            "gives the clip."
        )
    low, high = frames.aminmax()
    if low < -1e-3 or high > 1 + 1e-3:
        raise FlowError(
            f"frames: expected values in [0, 1], got [{low.item():g}, {high.item():g}]. "
            "Rescale them."
        )


def _is_still(first: Tensor, frame: Tensor) -> bool:
    """Whether two frames (3,H,W) are equal up to noise (of about 4/255 a pixel and channel).

    Estimators make up motion where there is only noise. Means over 5x5 pixels quiet the noise,
    and anything that moves in sight stands out of them.
    """
    difference = F.avg_pool2d((frame - first)[None], 5, 1, 2, count_include_pad=False)
    return bool(difference.abs().max() < _STILL)


def _checked(backward: Tensor, forward: Tensor) -> tuple[Tensor, Tensor]:
    """The backward flow, and what the forward-backward check finds occluded."""
    return backward, _occluded(backward, forward)


def _occluded(backward: Tensor, forward: Tensor) -> Tensor:
    """Forward-backward check, (1,H,W): 1 where frame i's pixel isn't found back from frame 1.

    The bound grows with the motion, as in Sundaram et al., "Dense point trajectories by
    GPU-accelerated large displacement optical flow" (2010).
    """
    _, height, width = backward.shape
    position = pixel_grid(height, width, backward) + backward
    returned = sample_at(forward, position)
    error = (backward + returned).square().sum(dim=0)
    bound = 0.01 * (backward.square() + returned.square()).sum(dim=0) + 0.5
    limit = position.new_tensor([width - 1, height - 1]).view(2, 1, 1)
    outside = ((position < -0.5) | (position > limit + 0.5)).any(dim=0)
    return ((error > bound) | outside)[None].float()


def _grey(image: Tensor) -> np.ndarray:
    """(3,h,w) in [0,1] to (h,w) uint8 luma, what OpenCV's estimators take."""
    luma = (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0)
    return (luma * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _enlarged(image: Tensor, height: int, width: int) -> Tensor:
    if tuple(image.shape[1:]) == (height, width):
        return image
    larger = F.interpolate(image[None], size=(height, width), mode="bicubic", align_corners=False)
    return larger[0].clamp(0, 1)


def _shrunk(flow: Tensor, height: int, width: int) -> Tensor:
    """Flow (2,h,w) at (2,height,width), vectors scaled with it."""
    factor = flow.new_tensor([width / flow.shape[2], height / flow.shape[1]])
    return resample(flow[None], height, width)[0] * factor.view(2, 1, 1)


def _kept_inside(flow: Tensor, grid: Tensor) -> Tensor:
    """Flow that doesn't leave the picture by more than an eighth of it.

    Chains would run away, and DIS diverges when it is begun far outside.
    """
    size = flow.new_tensor([flow.shape[2], flow.shape[1]]).view(2, 1, 1)
    return torch.minimum(torch.maximum(grid + flow, -size / 8), size * 9 / 8) - grid
