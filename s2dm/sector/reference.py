"""Reference attention: in self-attention every frame also sees frame 1, and no other frame."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class ReferenceStates:
    """What frame 1 looks like to each self-attention layer at one step of sampling.

    The states of frame 1 become further keys and values of every frame. A frame attends to its own
    and to frame 1's in one softmax, so with equal frames attention is what it was. Because frames
    come in chunks, the states are kept from the chunk that holds frame 1 for those after it; of a
    clip of any length they are those of one frame.
    """

    _kept: dict[Hashable, Tensor] = field(default_factory=dict)

    def beside(self, layer: Hashable, states: Tensor, groups: int, first: bool) -> Tensor:
        """The states that each row of a batch sees beside its own.

        Args:
            layer: names the layer, and whatever else the states of a step differ by.
            states: (groups · n, L, C), the inputs of the layer: n frames of a clip for each of
                the conditions or clips that are predicted side by side.
            groups: how many these are.
            first: whether the n frames begin with frame 1, whose states are then kept.

        Returns:
            (groups · n, L, C), frame 1's.

        Raises:
            RuntimeError: frame 1 has not been seen yet.
        """
        of_group = states.unflatten(0, (groups, -1))
        if first:
            # A copy: a view would keep the states of all n frames in memory.
            self._kept[layer] = of_group[:, :1].clone()
        elif layer not in self._kept:
            raise RuntimeError(
                "reference attention: expected the frames from frame 1 on, got others first."
            )
        return self._kept[layer].expand(-1, of_group.shape[1], -1, -1).flatten(0, 1)
