"""Sizes and settings of every part of a checkpoint, as frozen dataclasses.

The names follow the `ldm` code base of Stable Diffusion 1.x, because the file keeps its
keys. All configs turn into plain JSON (`to_dict`) and back (`from_dict`), which checks
names and values so that a broken file is refused in plain words.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..sector import BETA_SCHEDULES, NOISE_SHARING
from ..settings import SettingsError, from_dict

FORMAT_VERSION = 1
"""Version of the checkpoint format that this code writes, and the newest that it reads."""

FUSIONS = ("channel", "token", "spatial", "channel+spatial")
NORM_SPANS = ("frame", "clip")
NULL_LABELS = ("learned", "zero")
UPSAMPLINGS = ("nearest", "transposed")
FLOW_FORMS = ("displacement", "positions")
LATENT_CELL = 8
"""Pixels along each side of one latent of Stable Diffusion."""
NORM_GROUPS = 32  # GroupNorm groups in every block of Stable Diffusion

# Far above any real model. A damaged file may claim any number, and what follows from it must
# neither overflow nor take long to list; the weights' shapes are compared after that.
_MOST = 2**16
_MOST_LEVELS = 8
_MOST_BLOCKS = 16
_MOST_LAYERS = 512
_MOST_TOKENS = 2**20
_MOST_PIXELS = 2**14  # along a side
_MOST_STEPS = 10**5
_MOST_COUNT = 10**12
_HUGE = 1e30


_C = TypeVar("_C", bound="_Config")
_LAYER = re.compile(r"(input|middle|output)_[0-9]{1,3}_[0-9]{1,3}")


def whole_cells(side: int, cell: int = LATENT_CELL) -> int:
    """Pixels of the latents that hold a side of so many pixels: the next multiple of `cell`."""
    return -(-side // cell) * cell


@dataclass(frozen=True)
class _Config:
    """Dictionary form and checks that all configs share."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-ready dictionaries, lists and numbers."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """Build a config from `to_dict` output. Missing entries take their defaults.

        Raises:
            SettingsError: if an entry is unknown, has the wrong type or a value out of range.
        """
        try:
            return from_dict(cls, values, check_types=False)
        except TypeError as error:
            raise SettingsError(f"{cls.__name__}: {error}.") from error

    def _expect(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            got = getattr(self, name)
            raise SettingsError(f"{type(self).__name__}.{name}: expected {expected}, got {got!r}.")

    def _expect_positive(self, *names: str, most: int = _MOST) -> None:
        for name in names:
            good = _is_count(getattr(self, name), most)
            self._expect(good, name, f"a whole number from 1 to {most}")

    def _expect_multipliers(self, name: str, most: int = _MOST) -> None:
        value = getattr(self, name)
        good = (
            isinstance(value, tuple)
            and 1 <= len(value) <= _MOST_LEVELS
            and all(_is_count(item, most) for item in value)
        )
        expected = f"a list of 1 to {_MOST_LEVELS} whole numbers from 1 to {most}"
        self._expect(good, name, expected)

    def _expect_widths(self) -> None:
        """Multipliers of the levels, and what follows from them."""
        self._expect_multipliers("channel_mult")
        good = max(getattr(self, "widths")) <= _MOST  # noqa: B009 (of those that have levels)
        self._expect(good, "channel_mult", f"levels of at most {_MOST} channels")

    def _expect_levels(self) -> None:
        self._expect_widths()
        # ldm and diffusers agree on the width of the first convolution only then.
        first, *_ = getattr(self, "channel_mult")  # noqa: B009
        self._expect(first == 1, "channel_mult", "a list that starts with 1")


def _is_count(value: Any, most: int = _MOST, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -_HUGE < value < _HUGE


def _plain(value: Any) -> Any:
    if isinstance(value, _Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class UNetConfig(_Config):
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
        self._expect_positive("num_res_blocks", most=_MOST_BLOCKS)
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
class VAEConfig(_Config):
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
            bare or _is_count(self.num_res_blocks, _MOST_BLOCKS),
            "num_res_blocks",
            f"a whole number from 1 to {_MOST_BLOCKS}, or 0 where all multipliers are 1",
        )
        self._expect(self.channels % NORM_GROUPS == 0, "channels", f"a multiple of {NORM_GROUPS}")
        good = _is_number(self.scaling_factor) and self.scaling_factor > 0
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
class TextEncoderConfig(_Config):
    """A CLIP text encoder; the defaults are CLIP ViT-L's, as in Stable Diffusion 1.x."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 49408
    max_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        self._expect_positive("hidden_size", "heads", "intermediate_size", "max_length")
        self._expect_positive("layers", most=_MOST_LAYERS)
        self._expect_positive("vocab_size", most=_MOST_TOKENS)
        self._expect(
            self.hidden_size % self.heads == 0, "heads", f"a divisor of {self.hidden_size}"
        )
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            good = _is_count(value, self.vocab_size - 1, least=0)
            self._expect(good, name, f"an id below {self.vocab_size}")


@dataclass(frozen=True)
class FlowAdapterConfig(_Config):
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
        good = _is_count(self.frequencies, _MOST_BLOCKS, least=0)
        self._expect(good, "frequencies", f"a whole number from 0 to {_MOST_BLOCKS}")
        self._expect_multipliers("grid")
        self._expect(len(self.grid) == 2, "grid", "two numbers, rows and columns")
        good = (
            isinstance(self.levels, tuple)
            and len(self.levels) > 0
            and all(_is_count(level, _MOST_LEVELS - 1, least=0) for level in self.levels)
            and all(before < after for before, after in itertools.pairwise(self.levels))
        )
        self._expect(good, "levels", f"ascending whole numbers from 0 to {_MOST_LEVELS - 1}")
        good = isinstance(self.layers, tuple) and all(
            isinstance(layer, tuple)
            and len(layer) == 2
            and isinstance(layer[0], str)
            and _LAYER.fullmatch(layer[0]) is not None
            and _is_count(layer[1])
            for layer in self.layers
        )
        self._expect(good, "layers", "a list of (name, width) pairs, the names like input_1_0")
        self._expect(len(self.layers) <= _MOST_LAYERS, "layers", f"at most {_MOST_LAYERS}")
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
class ScheduleConfig(_Config):
    """The noise schedule; the defaults are those of Stable Diffusion 1.x.

    `beta_schedule` "cosine" (LFDM's) has no use for `beta_start` and `beta_end`.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        self._expect_positive("steps", most=_MOST_STEPS)
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            self._expect(_is_number(value) and 0 < value < 1, name, "a number between 0 and 1")
        good = self.beta_schedule in BETA_SCHEDULES
        self._expect(good, "beta_schedule", f"one of {BETA_SCHEDULES}")
        predictions = ("epsilon", "v_prediction")
        self._expect(
            self.prediction_type in predictions, "prediction_type", f"one of {predictions}"
        )


@dataclass(frozen=True)
class SamplingConfig(_Config):
    """How a checkpoint recommends to sample its clips; the defaults are the paper's.

    `steps` are those of stage 2. `guidance_scale` is the prompt's, `flow_guidance_scale`
    the flow's: `None` to guide both together, as in the paper. The first `flow_start` of the
    noise schedule, 0 to 1, is sampled without the flow. From there until `anchor_end`, 0 to 1,
    frames are anchored to frame 1 (0: not at all, the paper's plain method); with
    `reference_attention` they also see frame 1 in self-attention.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    flow_guidance_scale: float | None = None
    flow_start: float = 0.0
    anchor_end: float = 0.0
    reference_attention: bool = False

    def __post_init__(self) -> None:
        self._expect_positive("steps", most=_MOST_STEPS)
        for name in ("flow_start", "anchor_end"):
            value = getattr(self, name)
            self._expect(_is_number(value) and 0 <= value <= 1, name, "a number from 0 to 1")
        flag = isinstance(self.reference_attention, bool)
        self._expect(flag, "reference_attention", "true or false")
        for name in ("guidance_scale", "flow_guidance_scale"):
            value = getattr(self, name)
            none = value is None and name == "flow_guidance_scale"
            good = none or (_is_number(value) and value >= 0)
            self._expect(good, name, "a number from 0")

    def replacing(self, entries: Mapping[str, Any] | None) -> SamplingConfig:
        """Return these settings with some entries in place of their own.

        Raises:
            SettingsError: if one is unknown, or its value out of range.
        """
        return SamplingConfig.from_dict({**self.to_dict(), **(entries or {})})

    def __str__(self) -> str:
        flow = "" if self.flow_guidance_scale is None else f" (flow {self.flow_guidance_scale:g})"
        start = f", flow from {self.flow_start:g}" if self.flow_start else ""
        anchor = f", anchored to {self.anchor_end:g}" if self.anchor_end else ""
        sees = ", reference attention" if self.reference_attention else ""
        return (
            f"DDIM, {self.steps} steps, guidance {self.guidance_scale:g}{flow}{start}{anchor}{sees}"
        )


@dataclass(frozen=True)
class FlowGeneratorConfig(_Config):
    """The stage-1 network, which generates flow; the defaults are LFDM's published values.

    `reference_channels` and `text_dim` are the channels of the reference frame's features
    and the width of the prompt's embedding. `null_reference` and `null_text` say what
    stands for a dropped condition: a learned label or zeros. `motion_strength` adds that
    input. `norm` is what a group normalisation spans: one frame, so that frames meet in
    temporal attention only, or the whole clip as in LFDM. `upsample` is a transposed
    convolution, or nearest neighbours and a convolution. The finest level works on squares of
    `patch` x `patch` cells of the flow: 2 is a quarter of the work.

    The network was trained on `frames` frames of `size` (height, width), with displacements
    counted in units of `displacement_scale` half-frames, and on clips that move by `motion`
    half-frames on the mean over pixels and frames (0: not known). `schedule` is its noise
    schedule. `threshold` is the percentile of dynamic thresholding in sampling, 0 for none.
    """

    reference_channels: int = 256
    text_dim: int = 768
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_heads: int = 8
    head_dim: int = 32
    norm_groups: int = 8
    norm: str = "clip"
    upsample: str = "transposed"
    patch: int = 1
    null_reference: str = "zero"
    null_text: str = "zero"
    motion_strength: bool = False
    size: tuple[int, int] = (32, 32)
    frames: int = 40
    displacement_scale: float = 1.0
    motion: float = 0.0
    schedule: ScheduleConfig = ScheduleConfig(beta_schedule="cosine")
    threshold: float = 0.9
    flow: str = "displacement"

    def __post_init__(self) -> None:
        self._expect(self.flow in FLOW_FORMS, "flow", f"one of {FLOW_FORMS}")
        self._expect_positive(
            "reference_channels",
            "text_dim",
            "model_channels",
            "num_heads",
            "head_dim",
            "norm_groups",
            "frames",
        )
        self._expect_positive("patch", most=_MOST_BLOCKS)
        self._expect_widths()
        self._expect_multipliers("size", _MOST_PIXELS)
        good = len(self.size) == 2 and not any(side % self.factor for side in self.size)
        self._expect(good, "size", f"height and width, multiples of {self.factor}")
        good = _is_number(self.displacement_scale) and self.displacement_scale > 0
        self._expect(good, "displacement_scale", "a number above 0")
        self._expect(_is_number(self.motion) and self.motion >= 0, "motion", "a number from 0")
        good = _is_number(self.threshold) and 0 <= self.threshold < 1
        self._expect(good, "threshold", "a percentile from 0 to below 1")
        self._expect(isinstance(self.schedule, ScheduleConfig), "schedule", "a schedule")
        # Time is embedded in pairs of sine and cosine, and rotary positions turn pairs.
        self._expect(
            self.model_channels % 2 == 0 and self.model_channels >= 4,
            "model_channels",
            "an even number of at least 4",
        )
        self._expect(self.head_dim % 2 == 0, "head_dim", "an even number")
        self._expect(
            all(width % self.norm_groups == 0 for width in (self.model_channels, *self.widths)),
            "norm_groups",
            f"a divisor of the widths {self.widths}",
        )
        self._expect(self.norm in NORM_SPANS, "norm", f"one of {NORM_SPANS}")
        self._expect(self.upsample in UPSAMPLINGS, "upsample", f"one of {UPSAMPLINGS}")
        for name in ("null_reference", "null_text"):
            self._expect(getattr(self, name) in NULL_LABELS, name, f"one of {NULL_LABELS}")
        self._expect(isinstance(self.motion_strength, bool), "motion_strength", "true or false")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def factor(self) -> int:
        """Height and width of a clip have to be multiples of this number (8 for LFDM)."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class AdapterTrainingConfig(_Config):
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
            good = _is_count(getattr(self, name), _MOST_COUNT, least=0)
            self._expect(good, name, f"a whole number from 0 to {_MOST_COUNT}")


@dataclass(frozen=True)
class RegionMotionConfig(_Config):
    """The region-motion model; the defaults are LFDM's published RegionMM (`region_motion.py`).

    It reads frames of `size` (height, width). `regions` are told apart by an hourglass of
    `levels` levels from `width` channels, at most `max_width`, and a map for each with
    `map_padding` cells around it and a softmax at `temperature`. The flow of the regions is
    joined by another hourglass from `flow_width` channels. Both work on frames made smaller by
    `shrink`, as do the features of a frame: `frame_width` channels at full size, twice as many
    with each halving, and `frame_blocks` residual blocks ahead of the
    decoder.
    """

    size: tuple[int, int] = (128, 128)
    regions: int = 10
    levels: int = 5
    width: int = 32
    flow_width: int = 64
    max_width: int = 1024
    map_padding: int = 0
    temperature: float = 0.1
    frame_levels: int = 2
    frame_width: int = 64
    frame_blocks: int = 6

    def __post_init__(self) -> None:
        self._expect_positive("regions", "width", "flow_width", "max_width", "frame_width")
        self._expect_positive("levels", "frame_levels", most=_MOST_LEVELS)
        self._expect_positive("frame_blocks", most=_MOST_BLOCKS)
        good = _is_number(self.temperature) and self.temperature > 0
        self._expect(good, "temperature", "a number above 0")
        self._expect_multipliers("size", _MOST_PIXELS)
        good = len(self.size) == 2 and not any(side % self.factor for side in self.size)
        self._expect(good, "size", f"height and width, multiples of {self.factor}")
        # A map is as large as the smaller frame, less what its 7x7 convolution loses.
        good = _is_count(self.map_padding, 3, least=0) and min(self.map_size) > 1
        self._expect(good, "map_padding", "0 to 3, with maps of at least 2x2 cells")

    @property
    def shrink(self) -> int:
        """How many pixels along a side make one cell of the flow and of the features."""
        return 2**self.frame_levels

    @property
    def factor(self) -> int:
        """Height and width have to be multiples of this number (128 for LFDM)."""
        return self.shrink * 2**self.levels

    @property
    def flow_size(self) -> tuple[int, int]:
        """Height and width of the flow and of the features, (32, 32) for LFDM."""
        return self.size[0] // self.shrink, self.size[1] // self.shrink

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the regions' maps."""
        height, width = self.flow_size
        return height - 6 + 2 * self.map_padding, width - 6 + 2 * self.map_padding

    @property
    def feature_channels(self) -> int:
        """Channels of a frame's features (256 for LFDM)."""
        return self.frame_width * self.shrink


@dataclass(frozen=True)
class BertConfig(_Config):
    """A BERT text encoder; the defaults are those of bert-base-cased, which LFDM reads with."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 28996
    max_length: int = 512

    def __post_init__(self) -> None:
        self._expect_positive("hidden_size", "heads", "intermediate_size", "max_length")
        self._expect_positive("layers", most=_MOST_LAYERS)
        self._expect_positive("vocab_size", most=_MOST_TOKENS)
        self._expect(
            self.hidden_size % self.heads == 0, "heads", f"a divisor of {self.hidden_size}"
        )


@dataclass(frozen=True)
class S2DMConfig(_Config):
    """Everything a checkpoint says about itself. A part that it does not hold is `None`.

    `text_encoder` reads the prompt for both stages, unless there is a `flow_text_encoder`, which
    reads it for stage 1. The features of the reference frame are the VAE's latents, unless there
    is a `region_motion` and the flow generator was trained on its features. `tokenizer` and
    `flow_tokenizer` are the specifications of the encoders' tokenizers (see `tokenizer.py` and
    `bert.py`); `sampling` is what the checkpoint recommends;
    `resolution` is (height, width) in pixels; `data` and `licence` are free text for people.
    `adapter_training` is known of an adapter that was trained alone, for a model of its own.
    `frames`, `noise_sharing` and `noise_share` say how stage 2 was trained. Sampling does not
    follow the last two: it shares noise unless told otherwise.
    """

    format_version: int = FORMAT_VERSION
    unet: UNetConfig | None = None
    vae: VAEConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    flow_adapter: FlowAdapterConfig | None = None
    flow_generator: FlowGeneratorConfig | None = None
    region_motion: RegionMotionConfig | None = None
    flow_text_encoder: BertConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    sampling: SamplingConfig = SamplingConfig()
    tokenizer: dict[str, Any] | None = None
    flow_tokenizer: dict[str, Any] | None = None
    resolution: tuple[int, int] = (128, 128)
    frames: int = 16
    noise_sharing: str = "shared"
    noise_share: float = 1.0
    data: str = ""
    licence: str = ""
    adapter_training: AdapterTrainingConfig | None = None

    def __post_init__(self) -> None:
        training = self.adapter_training
        good = training is None or isinstance(training, AdapterTrainingConfig)
        self._expect(good, "adapter_training", "base, clips and steps")
        self._expect(_is_count(self.format_version), "format_version", "a whole number")
        self._expect(isinstance(self.schedule, ScheduleConfig), "schedule", "a schedule")
        self._expect(isinstance(self.sampling, SamplingConfig), "sampling", "steps and guidance")
        self._expect_positive("frames")
        self._expect_multipliers("resolution", _MOST_PIXELS)
        self._expect(len(self.resolution) == 2, "resolution", "height and width")
        sharing = self.noise_sharing
        self._expect(sharing in NOISE_SHARING, "noise_sharing", f"one of {NOISE_SHARING}")
        good = _is_number(self.noise_share) and 0 <= self.noise_share <= 1
        self._expect(good, "noise_share", "a number from 0 to 1")
        for name in ("data", "licence"):
            self._expect(isinstance(getattr(self, name), str), name, "text")
        for name in ("tokenizer", "flow_tokenizer"):
            value = getattr(self, name)
            self._expect(value is None or isinstance(value, Mapping), name, "a dictionary")
        if self.unet is not None and self.flow_adapter is not None:
            self._expect(
                dict(self.flow_adapter.layers).items()
                <= dict(self.unet.cross_attention_layers()).items(),
                "flow_adapter",
                f"layers among {self.unet.cross_attention_layers()}",
            )
        if self.unet is not None and self.text_encoder is not None:
            self._expect(
                self.unet.context_dim == self.text_encoder.hidden_size,
                "text_encoder",
                f"hidden_size equal to the U-Net's context_dim, {self.unet.context_dim}",
            )
        reader = self.flow_text_encoder or self.text_encoder
        if self.flow_generator is not None and reader is not None:
            self._expect(
                self.flow_generator.text_dim == reader.hidden_size,
                "flow_generator",
                f"text_dim equal to the text encoder's hidden_size, {reader.hidden_size}",
            )

    def recommending(self, entries: Mapping[str, Any]) -> S2DMConfig:
        """Return the config with these entries of `sampling` in place of its own.

        Raises:
            SettingsError: if one is unknown, or its value out of range.
        """
        return dataclasses.replace(self, sampling=self.sampling.replacing(entries))

    def adapter_only(self) -> S2DMConfig:
        """Return the config of a file that holds the flow adapter alone."""
        return dataclasses.replace(
            self,
            unet=None,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            flow_generator=None,
            region_motion=None,
            flow_text_encoder=None,
            flow_tokenizer=None,
        )
