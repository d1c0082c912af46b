"""What LFDM's own sampling and text reading are given, for the golden figures.

`tests/unit/data/lfdm_sampling_golden.npz` holds what LFDM's GaussianDiffusion (commit 3601635),
around the network of `lfdm_recipe`, makes of these draws in place of its random numbers, and
what its `bert_embed` says of two sequences of tokens, with transformers' BertModel below.
"""

import torch
from lfdm_recipe import CASES, draw

from s2dm.models import FlowGeneratorConfig, ScheduleConfig

NETWORK = CASES["zero_null"]
FRAMES, SIZE = 5, 8
# total: of the schedule; as many steps as that are ancestral.
SAMPLINGS = {
    "ddim": {"total": 1000, "steps": 10, "guidance": 1.0},
    "ddim guided": {"total": 1000, "steps": 7, "guidance": 3.0},
    "ancestral": {"total": 25, "steps": 25, "guidance": 1.0},
}
TOKENS = [[2, 4, 6, 7, 3], [2, 5, 3, 0, 0]]
"""Two prompts of the vocabulary of `lfdm_files`, the shorter one padded."""


def config(case: str) -> FlowGeneratorConfig:
    """Of the network with this schedule."""
    schedule = ScheduleConfig(steps=SAMPLINGS[case]["total"], beta_schedule="cosine")
    return FlowGeneratorConfig(
        **NETWORK["ours"],
        size=(SIZE, SIZE),
        frames=FRAMES,
        flow="positions",
        schedule=schedule,
    )


def noise(case: str, number: int) -> torch.Tensor:
    """The noise to start from, number 0, and that of each step, (1, N, 3, h, w)."""
    return draw(f"{case} noise {number}", (1, FRAMES, 3, SIZE, SIZE))


def conditions(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference (1, C, h, w) and text (1, D)."""
    lfdm = NETWORK["lfdm"]
    return (
        draw(f"{case} reference", (1, lfdm["channels"] - 3, SIZE, SIZE)),
        draw(f"{case} text", (1, lfdm["cond_dim"])),
    )
