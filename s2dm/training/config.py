"""Settings that all trainers share."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data import DataConfig
from ..settings import SettingsError
from .precision import MIXED_PRECISION


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every trainer shares. A run ends at `steps` or `max_minutes`, whichever is first.

    `output` is the run folder; `cache` (default `<output>/cache`) holds the prepared data
    and may be shared by several runs. `max_minutes` = 0 means no limit of time; the learning
    rate is annealed over whichever of the two is nearer its end. `threads` = 0 leaves PyTorch's
    number of CPU threads alone. `compile` runs the networks through torch.compile, which takes
    minutes to start.

    `optimizer` is "adamw" or "adam"; `gradient_clip` = 0 leaves gradients as they are, `ema_decay`
    = 0 keeps no average: sheets and exports then have the weights of the step. `mixed_precision`
    is "auto", "no", "bf16" or "fp16" (see `precision_on`). With
    `export_only` an existing run writes its averaged weights and does not go on.
    """

    output: str = "runs/training"
    cache: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 100_000
    max_minutes: float = 0.0
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.0
    warmup_steps: int = 100
    schedule: str = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    gradient_accumulation: int = 1
    ema_decay: float = 0.999
    mixed_precision: str = "auto"
    compile: bool = False
    threads: int = 0
    workers: int = 2
    seed: int = 0
    export_only: bool = False
    log_every: int = 20
    sample_every_minutes: float = 5.0
    save_every_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise SettingsError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}.")
        if self.optimizer not in ("adamw", "adam"):
            raise SettingsError(f"optimizer must be 'adamw' or 'adam', got {self.optimizer!r}.")
        if self.gradient_clip < 0 or not 0 <= self.ema_decay < 1:
            raise SettingsError(
                "gradient_clip must be at least 0 and ema_decay from 0 to less than 1, got "
                f"{self.gradient_clip} and {self.ema_decay}."
            )
        if self.mixed_precision not in MIXED_PRECISION:
            raise SettingsError(
                f"mixed_precision must be one of {', '.join(MIXED_PRECISION)}, got "
                f"{self.mixed_precision!r}."
            )
        for name in ("steps", "gradient_accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}.")
