"""Sizes of the networks of Stable Diffusion 1.x and of the text encoder that LFDM reads with."""

from __future__ import annotations

from dataclasses import dataclass

from .base import MOST_BLOCKS, MOST_LAYERS, MOST_TOKENS, Config, is_count, is_number

LATENT_CELL = 8
"""Pixels along each side of one latent of Stable Diffusion."""
NORM_GROUPS = 32  # GroupNorm groups in every block of Stable Diffusion


def whole_cells(side: int, cell: int = LATENT_CELL) -> int:
    """Pixels of the latents that hold a side of so many pixels: the next multiple of `cell`."""
    return -(-side // cell) * cell


@dataclass(frozen=True)
class UNetConfig(Config):
    """The denoising U-Net of Stable Diffusion 1.x, at any size; the defaults are 1.5's."""

    in_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_heads: int = 8
    context_dim: int = 768

    def __post_init__(self) -> None:
        self._expect_positive("in_channels", "model_channels", "num_heads", "context_dim")
        self._expect_positive("num_res_blocks", most=MOST_BLOCKS)
        self._expect_levels()
        levels = self.attention_levels
        self._expect(
            isinstance(levels, tuple)
            and len(levels) == len(self.channel_mult)
            and all(isinstance(level, bool) for level in levels),
            "attention_levels",
            f"{len(self.channel_mult)} true or false values, one for each level",
        )
        self._expect(
            self.model_channels % NORM_GROUPS == 0, "model_channels", f"a multiple of {NORM_GROUPS}"
        )
        self._expect(
            all(width % self.num_heads == 0 for width in self.widths),
            "num_heads",
            f"a divisor of the widths {self.widths}",
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    def cross_attention_layers(self) -> tuple[tuple[str, int], ...]:
        """Return `(name, width)` of each cross-attention layer, in the order they run.

        A name joins what ComfyUI reports while a layer runs: `transformer_options["block"]`
        and `["block_index"]`. So `("input", 1)` and 0 give `"input_1_0"`, the middle
        block is `"middle_0_0"`, and outputs count from 0 at the coarsest level.
        """
        layers = []
        number = 1  # input block 0 is the first convolution
        last = len(self.widths) - 1
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                if self.attention_levels[level]:
                    layers.append((f"input_{number}_0", width))
                number += 1
            if level != last:
                number += 1  # the downsampling block
        layers.append(("middle_0_0", self.widths[-1]))
        number = 0
        for level in range(last, -1, -1):
            for _ in range(self.num_res_blocks + 1):
                if self.attention_levels[level]:
                    layers.append((f"output_{number}_0", self.widths[level]))
                number += 1
        return tuple(layers)

    def cross_attention_levels(self) -> tuple[int, ...]:
        """Return the levels of these layers, finest first: 0 has the size of the latents."""
        last = len(self.widths) - 1  # where the middle block is
        levels = self.attention_levels
        return tuple(level for level in range(last + 1) if levels[level] or level == last)


@dataclass(frozen=True)
class VAEConfig(Config):
    """The autoencoder of Stable Diffusion 1.x, at any size; the defaults are 1.5's."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        self._expect_positive("channels", "latent_channels")
        self._expect_levels()
        # Without blocks nothing in the encoder can change the width from level to level.
        bare = self.num_res_blocks == 0 and set(self.channel_mult) == {1}
        self._expect(
            bare or is_count(self.num_res_blocks, MOST_BLOCKS),
            "num_res_blocks",
            f"a whole number from 1 to {MOST_BLOCKS}, or 0 where all multipliers are 1",
        )
        self._expect(self.channels % NORM_GROUPS == 0, "channels", f"a multiple of {NORM_GROUPS}")
        good = is_number(self.scaling_factor) and self.scaling_factor > 0
        self._expect(good, "scaling_factor", "a number above 0")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    @property
    def factor(self) -> int:
        """Pixels along each side of one latent cell (8 for Stable Diffusion)."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class _TransformerConfig(Config):
    """What text encoders have in common."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 49408
    max_length: int = 77

    def __post_init__(self) -> None:
        self._expect_positive("hidden_size", "heads", "intermediate_size", "max_length")
        self._expect_positive("layers", most=MOST_LAYERS)
        self._expect_positive("vocab_size", most=MOST_TOKENS)
        self._expect(
            self.hidden_size % self.heads == 0, "heads", f"a divisor of {self.hidden_size}"
        )


@dataclass(frozen=True)
class TextEncoderConfig(_TransformerConfig):
    """A CLIP text encoder; the defaults are CLIP ViT-L's, as in Stable Diffusion 1.x."""

    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            good = is_count(value, self.vocab_size - 1, least=0)
            self._expect(good, name, f"an id below {self.vocab_size}")


@dataclass(frozen=True)
class BertConfig(_TransformerConfig):
    """A BERT text encoder; the defaults are those of bert-base-cased, which LFDM reads with."""

    vocab_size: int = 28996
    max_length: int = 512
