"""A clip: what every data set holds, and all that trainers and evaluation know of one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..flow import FlowField


@dataclass(frozen=True, eq=False)
class Garment:
    """A piece of clothing whose colour the caption names.

    Attributes:
        name: "top" or "trousers".
        colour: the word in the caption.
        palette: every word that captions have for it, with its RGB in [0, 1].
        mask: (H, W) bool, the pixels of frame 1 where the body part that wears it is seen.
    """

    name: str
    colour: str
    palette: dict[str, tuple[float, float, float]]
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a clip, their flow, and what they show.

    Attributes:
        frames: (N, 3, H, W), uint8 or float32 in [0, 1].
        flow: from each frame back to the first.
        caption: what happens in it.
        still: (1, 1, H, W) bool, the background that nothing covers in any frame; None where that
            isn't known.
        garments: of frame 1, where they are known.
        pose: (N, P, 18, 3), keypoints of the people as `s2dm.flow.pose_flow` takes them, where
            they are known.
        elsewhere: whether who is seen stands, or is filmed, in another way than captions of this
            data set mean: only the flow, or the picture itself, can say how.
    """

    frames: Tensor
    flow: FlowField
    caption: str
    still: Tensor | None = None
    garments: tuple[Garment, ...] = ()
    pose: Tensor | None = None
    elsewhere: bool = False

    @property
    def pixels(self) -> Tensor:
        """The frames as float32 in [0, 1]."""
        if self.frames.is_floating_point():
            return self.frames.float()
        return self.frames.float() / 255
