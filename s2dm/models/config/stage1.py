"""Sizes of the networks of stage 1: the flow generator, and LFDM's region-motion model."""

from __future__ import annotations

from dataclasses import dataclass

from .base import MOST_BLOCKS, MOST_LEVELS, Config, is_count, is_number
from .sampling import ScheduleConfig

NORM_SPANS = ("frame", "clip")
NULL_LABELS = ("learned", "zero")
UPSAMPLINGS = ("nearest", "transposed")
FLOW_FORMS = ("displacement", "positions")


@dataclass(frozen=True)
class FlowGeneratorConfig(Config):
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
    schedule: ScheduleConfig = ScheduleConfig(beta_schedule="cosine")  # noqa: RUF009 (frozen)
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
        self._expect_positive("patch", most=MOST_BLOCKS)
        self._expect_widths()
        self._expect_size("size", self.factor)
        good = is_number(self.displacement_scale) and self.displacement_scale > 0
        self._expect(good, "displacement_scale", "a number above 0")
        self._expect(is_number(self.motion) and self.motion >= 0, "motion", "a number from 0")
        good = is_number(self.threshold) and 0 <= self.threshold < 1
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
class RegionMotionConfig(Config):
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
        self._expect_positive("levels", "frame_levels", most=MOST_LEVELS)
        self._expect_positive("frame_blocks", most=MOST_BLOCKS)
        good = is_number(self.temperature) and self.temperature > 0
        self._expect(good, "temperature", "a number above 0")
        self._expect_size("size", self.factor)
        # A map is as large as the smaller frame, less what its 7x7 convolution loses.
        good = is_count(self.map_padding, 3, least=0) and min(self.map_size) > 1
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
