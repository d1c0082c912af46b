"""A LoRA on the attention of a frozen U-Net (arXiv 2106.09685), which learns beside an adapter.

Names are those of the weights in the file's (ldm) keys, without ".weight": both engines know them,
so that one seed gives both the same LoRA, and its file is one that ComfyUI's loaders take.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..files import save_tensors
from ..models import UNetConfig
from ..models.keys import unet_keys
from .trainer import TrainingError

_ATTENTION = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
_IN_FILE = "diffusion_model."


def is_attention(name: str) -> bool:
    """Whether this is a linear layer of attention, by its name in the file."""
    return _ATTENTION.fullmatch(name) is not None


class LoRA(nn.Module):
    """A change of low rank for each of some weights, none at the start.

    Args:
        shapes: (out, in) of each weight, by name.
        rank: of the changes.
        seed: of the first weights.
    """

    def __init__(self, shapes: Mapping[str, Iterable[int]], rank: int, seed: int) -> None:
        super().__init__()
        self.rank = rank
        self.names = sorted(shapes)
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            rows, columns = shapes[name]
            down = torch.empty(rank, columns)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            self.down.append(down)
            self.up.append(torch.zeros(rows, rank))
        self._number = {name: number for number, name in enumerate(self.names)}

    def changed(self, name: str, weight: Tensor) -> Tensor:
        """A weight with its change; the gradient goes to the change alone."""
        number = self._number[name]
        return weight.detach() + (self.up[number] @ self.down[number]).to(weight)

    def in_file(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this module under the keys of a LoRA file, in half precision."""
        found = {}
        for number, name in enumerate(self.names):
            key = _IN_FILE + name
            found[f"{key}.lora_up.weight"] = state[f"up.{number}"].half().contiguous()
            found[f"{key}.lora_down.weight"] = state[f"down.{number}"].half().contiguous()
            found[f"{key}.alpha"] = torch.tensor(float(self.rank))
        return found


def save_lora(path: Path, lora: LoRA, state: Mapping[str, Tensor], told: str) -> None:
    """Write a LoRA that ComfyUI's loaders take, whole or not at all.

    Args:
        path: of the file.
        lora: of which `state` are the weights.
        told: what it was trained on, for people.

    Raises:
        TrainingError: the disk is full, or the file can't be written.
    """
    metadata = {"format": "pt", "training": told}
    save_tensors(path, lora.in_file(state), TrainingError, metadata)


def attach_lora(unet: nn.Module, config: UNetConfig, rank: int, seed: int) -> LoRA:
    """A new LoRA on the attention of a diffusers U-Net that is frozen."""
    layers = {
        key.ldm.removesuffix(".weight"): unet.get_submodule(key.diffusers.removesuffix(".weight"))
        for key in unet_keys(config)
        if key.ldm.endswith(".weight") and is_attention(key.ldm.removesuffix(".weight"))
    }
    lora = LoRA({name: layer.weight.shape for name, layer in layers.items()}, rank, seed)
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", _Changed(lora, name), unsafe=True)
    return lora


class _Changed(nn.Module):
    """The change of one weight, without the LoRA becoming a part of the U-Net."""

    def __init__(self, lora: LoRA, name: str) -> None:
        super().__init__()
        self.changed = lambda weight: lora.changed(name, weight)

    def forward(self, weight: Tensor) -> Tensor:
        return self.changed(weight)
