"""The flow field of a clip: how every frame moved since the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import pixel_grid, resample, sample_at


class FlowError(ValueError):
    """Something about a flow field, or about making one, is not as it must be."""


@dataclass(frozen=True, eq=False)
class FlowField:
    """Backward optical flow from every frame of a clip to its first frame, with occlusion.

    This is the temporal condition y of S2DM (arXiv 2403.13408, section 3.3): flow f^i between
    frame 1 and frame i, and an occlusion map.

    displacement: (N,2,H,W) float32, (x, y) in pixels of the field's own size. The pixel p of
        frame i was at p + displacement[i, :, p] in frame 1.
    occlusion: (N,1,H,W) float32 in [0,1]; 1 where the pixel is not visible in frame 1.

    Both are all zeros for frame 1, which stands at index 0. Fields are values: every method
    returns a new one, and a FlowError is raised for anything that breaks these rules.
    """

    displacement: Tensor
    occlusion: Tensor

    def __post_init__(self) -> None:
        _check("displacement", self.displacement, channels=2)
        _check("occlusion", self.occlusion, channels=1)
        num_frames, _, height, width = self.displacement.shape
        if tuple(self.occlusion.shape) != (num_frames, 1, height, width):
            raise FlowError(
                f"occlusion: expected {(num_frames, 1, height, width)} to match the displacement, "
                f"got {tuple(self.occlusion.shape)}."
            )
        if self.displacement.device != self.occlusion.device:
            raise FlowError(
                "expected displacement and occlusion on one device, got "
                f"{self.displacement.device} and {self.occlusion.device}. Move one of them."
            )
        low, high = self.occlusion.aminmax()
        if low < 0 or high > 1:
            raise FlowError(
                f"occlusion: expected values in [0, 1], got [{low.item():.9g}, {high.item():.9g}]."
            )
        if self.displacement[0].any() or self.occlusion[0].any():
            raise FlowError(
                "expected zeros in frame 1, because displacement says where the pixels of each "
                "frame were in frame 1, got other values. Put the reference frame first; flow from "
                "each frame to the next is something else."
            )

    @classmethod
    def zeros(cls, num_frames: int, height: int, width: int) -> FlowField:
        """A clip in which nothing moves."""
        return cls(
            torch.zeros(num_frames, 2, height, width), torch.zeros(num_frames, 1, height, width)
        )

    @classmethod
    def from_condition(cls, condition: Tensor, height: int, width: int) -> FlowField:
        """The field whose `condition` this is, at height x width.

        condition: (N,3,h,w), displacement in half-frames and occlusion. Frame 1 is set to zero
        and occlusion is clamped, because a condition may come from a network.
        """
        if condition.ndim != 4 or condition.shape[1] != 3:
            raise FlowError(f"condition: expected (N,3,h,w), got {tuple(condition.shape)}.")
        condition = resample(condition.float(), height, width)
        half_frame = condition.new_tensor([width / 2, height / 2]).view(1, 2, 1, 1)
        first = _first_frame_zero(condition)
        return cls(condition[:, :2] * half_frame * first, condition[:, 2:].clamp(0, 1) * first)

    @property
    def num_frames(self) -> int:
        return self.displacement.shape[0]

    @property
    def height(self) -> int:
        return self.displacement.shape[2]

    @property
    def width(self) -> int:
        return self.displacement.shape[3]

    def __len__(self) -> int:
        return self.num_frames

    def resize(self, height: int, width: int) -> FlowField:
        """The same motion at another size: vectors grow and shrink with the picture."""
        if (height, width) == (self.height, self.width):
            return self
        factor = self.displacement.new_tensor([width / self.width, height / self.height])
        return FlowField(
            resample(self.displacement, height, width) * factor.view(1, 2, 1, 1),
            resample(self.occlusion, height, width).clamp(0, 1),
        )

    def crop(self, height: int, width: int, top: int = 0, left: int = 0) -> FlowField:
        """The motion of a part of the picture, height x width pixels from (top, left) on.

        It has to lie within the picture: what is beyond is left out.
        """
        rows, columns = slice(top, top + height), slice(left, left + width)
        return FlowField(self.displacement[..., rows, columns], self.occlusion[..., rows, columns])

    def pad(self, height: int, width: int) -> FlowField:
        """The field at the top left of a larger picture; what is added moves as the border does."""
        margin = (0, width - self.width, 0, height - self.height)
        return FlowField(
            F.pad(self.displacement, margin, mode="replicate"),
            F.pad(self.occlusion, margin, mode="replicate"),
        )

    def scale(self, factor: float) -> FlowField:
        """Move `factor` times as far (negative: the other way, 0: a still clip).

        Less motion hides less, so occlusion fades out with it; more motion leaves it as it is.
        """
        return FlowField(self.displacement * factor, self.occlusion * min(abs(factor), 1.0))

    def select(self, indices: Sequence[int]) -> FlowField:
        """The clip made of these frames, in this order. Frame 1, which all are measured from,
        leads it."""
        order = [range(self.num_frames)[index] for index in indices]
        if not order or order[0] != 0:
            raise FlowError(
                f"a selection must begin with frame 1 (index 0), which flow is measured from, got "
                f"{order or 'none'}"
            )
        return FlowField(self.displacement[order], self.occlusion[order])

    def retime(self, num_frames: int) -> FlowField:
        """The same motion in another number of frames, linear in time.

        The first and the last frame stay; one frame is the first alone.
        """
        if num_frames < 1:
            raise FlowError(f"expected at least one frame, got {num_frames}.")
        if num_frames == self.num_frames:
            return self
        time = torch.linspace(0, self.num_frames - 1, num_frames, dtype=torch.float64)
        before = time.floor().long()
        after = time.ceil().long()
        share = (time - before).to(self.displacement).view(-1, 1, 1, 1)
        return FlowField(
            self.displacement[before].lerp(self.displacement[after], share),
            self.occlusion[before].lerp(self.occlusion[after], share),
        )

    def warp(self, image: Tensor) -> Tensor:
        """Each frame as frame 1 shows it: `image` sampled at p + displacement.

        image: (1,C,H,W), the first frame, or (N,C,H,W), one image a frame. Returns (N,C,H,W).
        Bilinear; outside the picture the border is repeated. Occluded pixels show whatever
        lies there in frame 1.
        """
        size = (self.height, self.width)
        if image.ndim != 4 or image.shape[0] not in (1, self.num_frames) or image.shape[2:] != size:
            raise FlowError(
                f"image: expected (1 or {self.num_frames}, C, {self.height}, {self.width}), got "
                f"{tuple(image.shape)}. Resize the field or the image."
            )
        grid = pixel_grid(self.height, self.width, self.displacement)
        position = (grid + self.displacement).to(image.device)
        # In float32: half precision can't tell the pixels of a larger picture apart.
        frames = image.float().expand(self.num_frames, -1, -1, -1)
        return sample_at(frames, position).to(image.dtype)

    def condition(self, height: int, width: int) -> Tensor:
        """What the model sees: (N,3,height,width), displacement in half-frames and occlusion.

        Displacement is x*2/W, y*2/H, so it does not depend on the size of the field.
        """
        half_frame = self.displacement.new_tensor([self.width / 2, self.height / 2])
        half_frame = half_frame.view(1, 2, 1, 1)
        parts = zip(self.displacement.split(16), self.occlusion.split(16), strict=True)
        # A few frames at a time: long clips are large at their own size.
        full = (torch.cat([moved / half_frame, hidden], dim=1) for moved, hidden in parts)
        return torch.cat([resample(part, height, width) for part in full])

    def magnitude(self) -> Tensor:
        """Length of the displacement in pixels, (N,1,H,W)."""
        # Tensor.norm over the channels is many times slower on a CPU.
        return self.displacement.square().sum(dim=1, keepdim=True).sqrt()


def _check(name: str, tensor: Tensor, channels: int) -> None:
    if not isinstance(tensor, Tensor):
        raise FlowError(f"{name}: expected a torch tensor, got {type(tensor).__name__}.")
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape:
        raise FlowError(
            f"{name}: expected (N,{channels},H,W) with at least one frame and one pixel, "
            f"got {tuple(tensor.shape)}."
        )
    if tensor.dtype != torch.float32:
        raise FlowError(f"{name}: expected float32, got {tensor.dtype}. Convert with .float().")
    # Both ends are NaN or infinite if any value is, in a tenth of isfinite's time.
    if not all(torch.isfinite(end) for end in tensor.aminmax()):
        raise FlowError(
            f"{name}: expected finite values, got NaN or infinity. Check what made the flow."
        )


def _first_frame_zero(like: Tensor) -> Tensor:
    """(N,1,1,1): 0 for frame 1, 1 for the others."""
    mask = like.new_ones(like.shape[0], 1, 1, 1)
    mask[0] = 0
    return mask
