"""Sizes of the flow adapter, and what one for a model of its own was trained on."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from .base import MOST_BLOCKS, MOST_COUNT, MOST_LAYERS, MOST_LEVELS, Config, is_count
from .networks import LATENT_CELL, NORM_GROUPS, UNetConfig

FUSIONS = ("channel", "token", "spatial", "channel+spatial")

_LAYER = re.compile(r"(input|middle|output)_[0-9]{1,3}_[0-9]{1,3}")


@dataclass(frozen=True)
class FlowAdapterConfig(Config):
    """The flow adapter: how flow becomes tokens, and which layers they enter.

    `grid` is the rows and columns of tokens of "channel" and "token". `levels` are the halvings of
    the latents' size that the layers work at, which "spatial" has features for: 0 is the latents'
    own size, 3 an eighth of it.
    """

    fusion: str = "channel"
    width: int = 256
    hidden: int = 64
    frequencies: int = 5
    grid: tuple[int, int] = (11, 7)
    levels: tuple[int, ...] = (0, 1, 2, 3)
    layers: tuple[tuple[str, int], ...] = UNetConfig().cross_attention_layers()

    def __post_init__(self) -> None:
        self._expect(self.fusion in FUSIONS, "fusion", f"one of {FUSIONS}")
        self._expect_positive("width", "hidden")
        for name in ("width", "hidden"):
            self._expect(
                getattr(self, name) % NORM_GROUPS == 0, name, f"a multiple of {NORM_GROUPS}"
            )
        good = is_count(self.frequencies, MOST_BLOCKS, least=0)
        self._expect(good, "frequencies", f"a whole number from 0 to {MOST_BLOCKS}")
        self._expect_multipliers("grid")
        self._expect(len(self.grid) == 2, "grid", "two numbers, rows and columns")
        good = (
            isinstance(self.levels, tuple)
            and len(self.levels) > 0
            and all(is_count(level, MOST_LEVELS - 1, least=0) for level in self.levels)
            and all(before < after for before, after in itertools.pairwise(self.levels))
        )
        self._expect(good, "levels", f"ascending whole numbers from 0 to {MOST_LEVELS - 1}")
        good = isinstance(self.layers, tuple) and all(
            isinstance(layer, tuple)
            and len(layer) == 2
            and isinstance(layer[0], str)
            and _LAYER.fullmatch(layer[0]) is not None
            and is_count(layer[1])
            for layer in self.layers
        )
        self._expect(good, "layers", "a list of (name, width) pairs, the names like input_1_0")
        self._expect(len(self.layers) <= MOST_LAYERS, "layers", f"at most {MOST_LAYERS}")
        names = [name for name, _ in self.layers]
        self._expect(len(set(names)) == len(names), "layers", "each name once")

    @property
    def tokens(self) -> int:
        """Number of flow tokens, 77 with the default grid: one for each text token."""
        return self.grid[0] * self.grid[1]

    @property
    def attended(self) -> str | None:
        """How the grid's tokens enter attention, "channel" or "token"; None without a grid."""
        kind = self.fusion.split("+")[0]
        return None if kind == "spatial" else kind

    @property
    def spatial(self) -> bool:
        """Whether features at the resolution of the latents are added to what attention gives."""
        return "spatial" in self.fusion.split("+")

    def condition_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the condition to encode for latents of height x width.

        Spatial features need a condition of the latents' own size in pixels, the tokens of a grid
        always the same one.
        """
        cells = (height, width) if self.spatial else self.grid
        return cells[0] * LATENT_CELL, cells[1] * LATENT_CELL

    @classmethod
    def for_unet(cls, unet: UNetConfig, **settings: Any) -> FlowAdapterConfig:
        """Return the config of an adapter for all cross-attention layers of `unet`."""
        layers, levels = unet.cross_attention_layers(), unet.cross_attention_levels()
        return cls(layers=layers, levels=levels, **settings)


@dataclass(frozen=True)
class AdapterTrainingConfig(Config):
    """What a flow adapter alone was trained on, for people who look for one for their model.

    `base` is the name of the model that it was trained for, `clips` how many clips it saw, in
    `steps` steps. Sizes, schedule, data and licence are those of the file.
    """

    base: str = ""
    clips: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self._expect(isinstance(self.base, str), "base", "text")
        for name in ("clips", "steps"):
            good = is_count(getattr(self, name), MOST_COUNT, least=0)
            self._expect(good, name, f"a whole number from 0 to {MOST_COUNT}")
