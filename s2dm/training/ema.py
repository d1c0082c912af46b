"""The average of a model's weights over its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a model's trainable parameters, in float32.

    The decay starts low and grows with the number of updates, (1 + n) / (10 + n), up to
    `decay`, so that the average is of use after a few steps. With a decay of 0 the average is
    the parameters themselves, and takes no memory.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.average = {
            k: p.detach().float().clone() if decay else p.detach() for k, p in self._live.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model holds the averaged weights."""
        if not self.decay:
            yield
            return
        kept = {k: p.detach().clone() for k, p in self._live.items()}
        try:
            self._copy(self.average)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for key, parameter in self._live.items():
            parameter.copy_(values[key])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average if self.decay else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for key, value in state["average"].items():
            self.average[key].copy_(value)
