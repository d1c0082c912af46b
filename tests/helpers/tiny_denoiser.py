"""A denoiser of a few numbers that reads an adapter's keys and values, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2dm.data.prepared import PreparedClips
from s2dm.models import FlowAdapter, FlowAdapterConfig
from s2dm.sector import alphas_cumprod
from s2dm.training.flow_adapter import (
    AdapterSettings,
    AdapterTrainer,
    Denoiser,
    new_adapter,
)

CONFIG = FlowAdapterConfig(
    width=32, hidden=32, grid=(2, 2), layers=(("input_1_0", 8), ("output_1_0", 8))
)
SETTINGS = {"steps": 6, "warmup_steps": 2, "clips": 2, "frames": 3, "chunk": 2, "save_every": 2}


def denoiser(adapter: FlowAdapter, kind: str = "epsilon") -> Denoiser:
    """x_t and text, moved by what the flow says."""

    def predict(x: Tensor, t: Tensor, tokens: Tensor, text: Tensor) -> Tensor:
        keys, values = adapter.keys_values("input_1_0", tokens)
        _, more = adapter.keys_values("output_1_0", tokens)
        told = (keys.sigmoid() * (values + more)).mean((1, 2)) + 0.1 * text.mean((1, 2))
        return x * (t / 1000).view(-1, 1, 1, 1) + told.view(-1, 1, 1, 1)

    return Denoiser(predict, alphas_cumprod(), kind, torch.device("cpu"), lambda x: 0.5 * x)


def trainer(folder: Path, prepared: PreparedClips, /, **settings: Any) -> AdapterTrainer:
    """A run in a folder."""
    options = {name: settings.pop(name) for name in ("resume", "between") if name in settings}
    kind = settings.pop("kind", "epsilon")
    chosen = AdapterSettings(**{**SETTINGS, **settings})
    adapter = new_adapter(CONFIG, chosen.seed)
    return AdapterTrainer(chosen, adapter, denoiser(adapter, kind), prepared, folder, **options)
