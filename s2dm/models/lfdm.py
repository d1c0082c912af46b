"""LFDM's names for the weights of a flow generator (arXiv 2303.13744), and conversion both ways.

LFDM's `diffusion` dictionary holds its 3D U-Net under `denoise_fn.`, beside the buffers of
the noise schedule. Its convolutions are 3D with a kernel of one frame, where ours are 2D, so
that some shapes have more ones in them; the numbers are the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config.stage1 import FlowGeneratorConfig
from .flow_generator import FlowGenerator

PREFIX = "denoise_fn."

# What follows from the settings, and is therefore no weight: LFDM computes these anew, and so
# do we. The rotary frequencies are stored once for each layer.
ROTARY = ".rotary_emb.freqs"
SCHEDULE = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    }
)

# Inside each kind of module: our name, and LFDM's.
_PLAIN = {"weight": "weight", "bias": "bias"}
_BLOCK = {
    f"{ours}.{leaf}": f"{lfdm}.{leaf}"
    for ours, lfdm in {
        "modulate": "mlp.1",
        "conv1": "block1.proj",
        "norm1": "block1.norm",
        "conv2": "block2.proj",
        "norm2": "block2.norm",
        "skip": "res_conv",
    }.items()
    for leaf in ("weight", "bias")
}
_LINEAR_ATTENTION = {
    "norm.weight": "fn.norm.gamma",
    "to_qkv.weight": "fn.fn.to_qkv.weight",
    "to_out.weight": "fn.fn.to_out.weight",
    "to_out.bias": "fn.fn.to_out.bias",
}
_ATTENTION = {
    "norm.weight": "fn.norm.gamma",
    "to_qkv.weight": "fn.fn.fn.to_qkv.weight",
    "to_out.weight": "fn.fn.fn.to_out.weight",
}


class Module(NamedTuple):
    """One module: our name, LFDM's, and the names of the weights inside."""

    ours: str
    lfdm: str
    inside: Mapping[str, str]


class Key(NamedTuple):
    """One weight: its name and shape on both sides."""

    ours: str
    lfdm: str
    shape: tuple[int, ...]
    lfdm_shape: tuple[int, ...]


def lfdm_modules(config: FlowGeneratorConfig) -> Iterator[Module]:
    """Yield the modules of the network that LFDM has too."""
    yield Module("position_bias", "time_rel_pos_bias.relative_attention_bias", _PLAIN)
    yield Module("time_embed.0", "time_mlp.1", _PLAIN)
    yield Module("time_embed.2", "time_mlp.3", _PLAIN)
    yield Module("first", "init_conv", _PLAIN)
    yield Module("first_attention", "init_temporal_attn", _ATTENTION)
    inner = "" if config.upsample == "transposed" else ".1"  # a convolution after upsampling
    for level in range(len(config.widths)):
        for side, convolution in (("down", ""), ("up", inner)):
            ours, lfdm = f"{side}.{level}", f"{side}s.{level}"
            yield Module(f"{ours}.block1", f"{lfdm}.0", _BLOCK)
            yield Module(f"{ours}.block2", f"{lfdm}.1", _BLOCK)
            yield Module(f"{ours}.spatial", f"{lfdm}.2", _LINEAR_ATTENTION)
            yield Module(f"{ours}.temporal", f"{lfdm}.3", _ATTENTION)
            yield Module(f"{ours}.resample{convolution}", f"{lfdm}.4{convolution}", _PLAIN)
    yield Module("middle.block1", "mid_block1", _BLOCK)
    yield Module("middle.spatial", "mid_spatial_attn", _ATTENTION)
    yield Module("middle.temporal", "mid_temporal_attn", _ATTENTION)
    yield Module("middle.block2", "mid_block2", _BLOCK)
    for ours, lfdm in (("flow_head", "final_conv"), ("occlusion_head", "occlusion_map")):
        yield Module(f"{ours}.block", f"{lfdm}.0", _BLOCK)
        yield Module(f"{ours}.conv", f"{lfdm}.1", _PLAIN)


def lfdm_keys(config: FlowGeneratorConfig) -> tuple[Key, ...]:
    """Return the weights that both have (LFDM's prefix included).

    Ours alone, and therefore not among them: motion strength and the null label of the
    reference frame.
    """
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in FlowGenerator(config).state_dict().items()}
    names = {"null_text": "null_cond_emb"}
    for module in lfdm_modules(config):
        for ours, lfdm in module.inside.items():
            names[f"{module.ours}.{ours}"] = f"{module.lfdm}.{lfdm}"
    return tuple(
        Key(ours, PREFIX + lfdm, shapes[ours], _lfdm_shape(ours, lfdm, shapes[ours]))
        for ours, lfdm in names.items()
        if ours in shapes  # not all blocks have all of the weights
    )


def lfdm_config(state: Mapping[str, Tensor]) -> FlowGeneratorConfig:
    """Return the config of LFDM's `diffusion` dictionary in one of its published variants.

    NATOPS was trained with a learned null label, and nearest neighbours for upsampling.
    """
    learned = f"{PREFIX}null_cond_emb" in state
    nearest = f"{PREFIX}ups.0.4.1.weight" in state
    return FlowGeneratorConfig(
        null_text="learned" if learned else "zero",
        upsample="nearest" if nearest else "transposed",
        flow="positions",
    )


def from_lfdm(state: Mapping[str, Tensor], config: FlowGeneratorConfig) -> dict[str, Tensor]:
    """Turn LFDM's `diffusion` dictionary into the weights of a `FlowGenerator`.

    Raises:
        ValueError: if a weight is missing, unexpected or of another shape.
    """
    keys = lfdm_keys(config)
    weights = {
        name: weight
        for name, weight in state.items()
        if name not in SCHEDULE and not name.endswith(ROTARY)
    }
    check_weights(weights, {key.lfdm: key.lfdm_shape for key in keys})
    return {key.ours: weights[key.lfdm].reshape(key.shape) for key in keys}


def _lfdm_shape(ours: str, lfdm: str, shape: Sequence[int]) -> tuple[int, ...]:
    if lfdm.endswith("gamma"):
        return (1, *shape, 1, 1, 1)
    if ".spatial.to_" in ours and not ours.startswith("middle") and len(shape) == 2:
        return (*shape, 1, 1)  # 1x1 convolutions there
    if len(shape) == 4:
        return (*shape[:2], 1, *shape[2:])
    return tuple(shape)


def check_weights(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless these are the weights expected, each of its shape."""
    remedy = "The weights belong to a model of another size or kind."
    for what, names in (
        ("missing", [name for name in expected if name not in state]),
        ("unexpected", [name for name in state if name not in expected]),
    ):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"weights: expected {len(expected)}, {what} '{names[0]}'{rest}. {remedy}"
            )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"'{name}': expected shape {shape}, got {tuple(state[name].shape)}. {remedy}"
            )
