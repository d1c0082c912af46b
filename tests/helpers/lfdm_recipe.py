"""Weights and inputs that LFDM's own network and ours can both rebuild, for the golden figures.

`tests/unit/data/lfdm_golden.npz` holds what LFDM's `Unet3D` (commit 3601635, with
rotary-embedding-torch 0.1.5) computes from them: for each case every sixteenth number of the
output, put into our order (B, N, 3, h, w), and its bucket of each offset from -63 to 63.
"""

import hashlib
import math

import torch

# lfdm: arguments of its Unet3D; ours: of FlowGeneratorConfig, beside LFDM's published sizes.
CASES = {
    "published": {
        "lfdm": {"dim": 64, "channels": 259, "cond_dim": 768, "learn_null_cond": False},
        "ours": {},
        "shape": (1, 3, 16, 16),
        "null": False,
    },
    "learned_null_and_nearest": {
        "lfdm": {
            "dim": 16,
            "channels": 7,
            "cond_dim": 12,
            "learn_null_cond": True,
            "use_deconv": False,
            "padding_mode": "reflect",
        },
        "ours": {
            "model_channels": 16,
            "reference_channels": 4,
            "text_dim": 12,
            "null_text": "learned",
            "upsample": "nearest",
        },
        "shape": (1, 40, 8, 16),
        "null": True,
    },
    "zero_null": {
        "lfdm": {"dim": 16, "channels": 7, "cond_dim": 12, "dim_mults": (1, 2, 4)},
        "ours": {
            "model_channels": 16,
            "reference_channels": 4,
            "text_dim": 12,
            "channel_mult": (1, 2, 4),
        },
        "shape": (2, 5, 8, 12),
        "null": True,
    },
}


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers that follow from a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight from its name at LFDM, so large that every layer matters."""
    values = draw(name, shape)
    if name.endswith("gamma") or (name.endswith("norm.weight") and len(shape) == 1):
        return 1 + 0.2 * values
    if len(shape) == 1 or "null_cond_emb" in name or "relative_attention_bias" in name:
        return values
    heads = ("final_conv.1.weight", "occlusion_map.1.weight")
    size = 0.02 if name.endswith(heads) else 1.5  # an output of about 1
    return values * size / math.sqrt(math.prod(shape[1:]))


def inputs(case: str) -> tuple[torch.Tensor, ...]:
    """Sample (B, N, 3, h, w), time steps (B,), reference (B, C, h, w), text (B, D)."""
    lfdm = CASES[case]["lfdm"]
    batch, frames, height, width = CASES[case]["shape"]
    return (
        draw(f"{case} sample", (batch, frames, 3, height, width)),
        torch.tensor([941, 7])[:batch],
        draw(f"{case} reference", (batch, lfdm["channels"] - 3, height, width)),
        draw(f"{case} text", (batch, lfdm["cond_dim"])),
    )


def seen(output: torch.Tensor) -> torch.Tensor:
    """The numbers of an output that the file keeps."""
    return output.flatten()[::16]
