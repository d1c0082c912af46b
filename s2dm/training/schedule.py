"""What a training step draws: times, frames, and which labels are null."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sector import NoiseSharing
from ..settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class LabelsAndNoise:
    """How noise is shared in training, and with which probabilities labels are null labels.

    `label_dropout` is that of text and flow together, which guidance starts from, `text_dropout`
    and `flow_dropout` those of one of them alone. `noise_share` counts in "mixed" noise only.
    """

    label_dropout: float = 0.1
    text_dropout: float = 0.05
    flow_dropout: float = 0.05
    noise_sharing: str = "shared"
    noise_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.sharing  # noqa: B018 (it checks mode and share)
        except ValueError as error:
            raise SettingsError(f"noise_sharing, noise_share: {error}") from error

    @property
    def sharing(self) -> NoiseSharing:
        return NoiseSharing(self.noise_sharing, self.noise_share)

    def draw_nulls(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each of `count` clips whether its text and its flow are null, (count,) bool each."""
        # Drawn independently, both would be null in one clip of a hundred, too few to learn it.
        draw = torch.rand(count, generator=generator)
        one_null = self.label_dropout + self.text_dropout
        text = draw < one_null
        flow = (draw < self.label_dropout) | (~text & (draw < one_null + self.flow_dropout))
        return text, flow


def draw_timesteps(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """One t of a schedule of `steps` for each of `count` clips, (count,) int64.

    Drawn in strata over the batch: the same distribution as one by one, and less variance.
    """
    strata = torch.randperm(count, generator=generator)
    where = (strata + torch.rand(count, generator=generator)) / count
    return (where * steps).long().clamp(max=steps - 1)


def draw_frames(count: int, choices: int, generator: torch.Generator) -> list[int]:
    """Frame 1, and one frame out of each interval of a clip.

    Args:
        count: of frames that are drawn.
        choices: frames of each interval, all of them stored one after the other.
        generator: isn't asked where there is nothing to choose.
    """
    if choices == 1:
        return list(range(count))
    picked = torch.randint(choices, (count - 1,), generator=generator).tolist()
    return [0, *(1 + choices * interval + one for interval, one in enumerate(picked))]
