"""Names and shapes of all weights: the `ldm` keys of the file, the `diffusers` ones beside.

Each table is computed from a config alone, so that a file can be checked before anything is
built, without diffusers. The keys are those of Stable Diffusion 1.x inside their part; the
part's prefix in the file (`model.diffusion_model.` and so on) is `checkpoint.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config.networks import BertConfig, TextEncoderConfig, UNetConfig, VAEConfig

Shape = tuple[int, ...]


class Key(NamedTuple):
    """One weight: its name and shape in the file and in diffusers (or transformers)."""

    ldm: str
    diffusers: str
    ldm_shape: Shape
    diffusers_shape: Shape


def unet_keys(config: UNetConfig) -> tuple[Key, ...]:
    """Return the weights of a Stable Diffusion 1.x U-Net (686 for 1.5)."""
    time = 4 * config.model_channels
    first = config.widths[0]
    keys = [
        *_linear("time_embed.0", "time_embedding.linear_1", first, time),
        *_linear("time_embed.2", "time_embedding.linear_2", time, time),
        *_conv("input_blocks.0.0", "conv_in", config.in_channels, first),
    ]
    for block in unet_blocks(config):
        if block.kind == "residual":
            keys += _residual(block, time, _UNET_RESIDUAL)
        elif block.kind == "attention":
            keys += _transformer(block, config.context_dim)
        else:
            keys += _conv(block.ldm, block.diffusers, block.before, block.after)
    keys += _norm("out.0", "conv_norm_out", first)
    keys += _conv("out.2", "conv_out", first, config.in_channels)
    return tuple(keys)


def vae_keys(config: VAEConfig) -> tuple[Key, ...]:
    """Return the weights of a Stable Diffusion 1.x autoencoder (248 for 1.5)."""
    widths, latent = config.widths, config.latent_channels
    last = len(widths) - 1
    keys = list(_conv("encoder.conv_in", "encoder.conv_in", 3, config.channels))
    width = config.channels
    for level, after in enumerate(widths):
        ldm, diffusers = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for i in range(config.num_res_blocks):
            names = f"{ldm}.block.{i}", f"{diffusers}.resnets.{i}"
            keys += _residual(Block("residual", *names, width, after), None, _VAE_RESIDUAL)
            width = after
        if level != last:
            keys += _conv(
                f"{ldm}.downsample.conv", f"{diffusers}.downsamplers.0.conv", width, width
            )
    keys += _vae_middle("encoder", width)
    keys += _norm("encoder.norm_out", "encoder.conv_norm_out", width)
    keys += _conv("encoder.conv_out", "encoder.conv_out", width, 2 * latent)
    keys += _conv("quant_conv", "quant_conv", 2 * latent, 2 * latent, 1)
    keys += _conv("post_quant_conv", "post_quant_conv", latent, latent, 1)
    keys += _conv("decoder.conv_in", "decoder.conv_in", latent, width)
    keys += _vae_middle("decoder", width)
    for level in range(
        last, -1, -1
    ):  # ldm counts from the finest level, diffusers from the coarsest
        ldm, diffusers = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        for i in range(config.num_res_blocks + 1):
            names = f"{ldm}.block.{i}", f"{diffusers}.resnets.{i}"
            keys += _residual(Block("residual", *names, width, widths[level]), None, _VAE_RESIDUAL)
            width = widths[level]
        if level:
            keys += _conv(f"{ldm}.upsample.conv", f"{diffusers}.upsamplers.0.conv", width, width)
    keys += _norm("decoder.norm_out", "decoder.conv_norm_out", width)
    keys += _conv("decoder.conv_out", "decoder.conv_out", width, 3)
    return tuple(keys)


def text_encoder_keys(config: TextEncoderConfig) -> tuple[Key, ...]:
    """Return the weights of a CLIP text encoder, named as transformers 4 does."""
    size = config.hidden_size
    keys = [
        _same("text_model.embeddings.token_embedding.weight", (config.vocab_size, size)),
        _same("text_model.embeddings.position_embedding.weight", (config.max_length, size)),
    ]
    for i in range(config.layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            keys += _linear(f"{layer}.self_attn.{name}", None, size, size)
        keys += _norm(f"{layer}.layer_norm1", None, size)
        keys += _linear(f"{layer}.mlp.fc1", None, size, config.intermediate_size)
        keys += _linear(f"{layer}.mlp.fc2", None, config.intermediate_size, size)
        keys += _norm(f"{layer}.layer_norm2", None, size)
    keys += _norm("text_model.final_layer_norm", None, size)
    return tuple(keys)


def own_keys(network: Callable[[Any], nn.Module], config: Any) -> tuple[Key, ...]:
    """Return the weights of a network of ours with this config, the same for all engines."""
    with torch.device("meta"):
        weights = network(config).state_dict()
    return tuple(_same(name, tuple(weight.shape)) for name, weight in weights.items())


def bert_keys(config: BertConfig) -> tuple[Key, ...]:
    """Return the weights of a BERT text encoder without its pooler, named as transformers does."""
    size = config.hidden_size
    keys = [
        _same("embeddings.word_embeddings.weight", (config.vocab_size, size)),
        _same("embeddings.position_embeddings.weight", (config.max_length, size)),
        _same("embeddings.token_type_embeddings.weight", (2, size)),
        *_norm("embeddings.LayerNorm", None, size),
    ]
    for i in range(config.layers):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            keys += _linear(f"{layer}.attention.self.{name}", None, size, size)
        keys += _linear(f"{layer}.attention.output.dense", None, size, size)
        keys += _norm(f"{layer}.attention.output.LayerNorm", None, size)
        keys += _linear(f"{layer}.intermediate.dense", None, size, config.intermediate_size)
        keys += _linear(f"{layer}.output.dense", None, config.intermediate_size, size)
        keys += _norm(f"{layer}.output.LayerNorm", None, size)
    return tuple(keys)


def attention_names(config: UNetConfig) -> dict[str, str]:
    """Map each cross-attention module of diffusers to its layer name.

    `"down_blocks.0.attentions.0.transformer_blocks.0.attn2"` to `"input_1_0"`; the names
    are those of `UNetConfig.cross_attention_layers`.
    """
    names = {}
    for block in unet_blocks(config):
        if block.kind == "attention":
            where, number = block.ldm.split(".")[:2]
            name = f"{where.split('_')[0]}_{0 if where == 'middle_block' else number}_0"
            names[f"{block.diffusers}.transformer_blocks.0.attn2"] = name
    return names


def to_diffusers(state: Mapping[str, Tensor], keys: Sequence[Key]) -> dict[str, Tensor]:
    """Rename and reshape weights from ldm to diffusers. Raises ValueError if one is missing."""
    _expect_all(state, [key.ldm for key in keys])
    return {key.diffusers: state[key.ldm].reshape(key.diffusers_shape) for key in keys}


def to_ldm(state: Mapping[str, Tensor], keys: Sequence[Key]) -> dict[str, Tensor]:
    """Rename and reshape weights from diffusers to ldm. Raises ValueError if one is missing."""
    _expect_all(state, [key.diffusers for key in keys])
    return {key.ldm: state[key.diffusers].reshape(key.ldm_shape) for key in keys}


def _expect_all(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"weights: expected '{missing[0]}' and {len(missing) - 1} more that are not there. "
            "The weights belong to a model of another size or kind."
        )


class Block(NamedTuple):
    """One module of the U-Net: its kind, both names, channels in and out."""

    kind: str  # "residual", "attention" or "resample"
    ldm: str
    diffusers: str
    before: int
    after: int


def unet_blocks(config: UNetConfig) -> Iterator[Block]:
    """Yield the modules of the U-Net between its first and last convolution, in order."""
    widths, last = config.widths, len(config.widths) - 1
    width = widths[0]
    skips = [width]
    number = 1
    for level, after in enumerate(widths):
        diffusers = f"down_blocks.{level}"
        for i in range(config.num_res_blocks):
            ldm = f"input_blocks.{number}"
            yield Block("residual", f"{ldm}.0", f"{diffusers}.resnets.{i}", width, after)
            width = after
            if config.attention_levels[level]:
                yield Block("attention", f"{ldm}.1", f"{diffusers}.attentions.{i}", width, width)
            skips.append(width)
            number += 1
        if level != last:
            names = f"input_blocks.{number}.0.op", f"{diffusers}.downsamplers.0.conv"
            yield Block("resample", *names, width, width)
            skips.append(width)
            number += 1
    yield Block("residual", "middle_block.0", "mid_block.resnets.0", width, width)
    yield Block("attention", "middle_block.1", "mid_block.attentions.0", width, width)
    yield Block("residual", "middle_block.2", "mid_block.resnets.1", width, width)
    number = 0
    for level in range(last, -1, -1):
        diffusers = f"up_blocks.{last - level}"
        after = widths[level]
        for i in range(config.num_res_blocks + 1):
            ldm, attends = f"output_blocks.{number}", config.attention_levels[level]
            before = width + skips.pop()
            yield Block("residual", f"{ldm}.0", f"{diffusers}.resnets.{i}", before, after)
            width = after
            if attends:
                yield Block("attention", f"{ldm}.1", f"{diffusers}.attentions.{i}", width, width)
            if level and i == config.num_res_blocks:
                names = f"{ldm}.{2 if attends else 1}.conv", f"{diffusers}.upsamplers.0.conv"
                yield Block("resample", *names, width, width)
            number += 1


def _same(name: str, shape: Shape) -> Key:
    return Key(name, name, shape, shape)


def _pair(ldm: str, diffusers: str | None, shape: Shape, bias: bool = True) -> list[Key]:
    """Weight of `shape` and, unless refused, bias. No second name: the same in both."""
    diffusers = ldm if diffusers is None else diffusers
    keys = [Key(f"{ldm}.weight", f"{diffusers}.weight", shape, shape)]
    if bias:
        keys.append(Key(f"{ldm}.bias", f"{diffusers}.bias", shape[:1], shape[:1]))
    return keys


def _conv(ldm: str, diffusers: str | None, before: int, after: int, size: int = 3) -> list[Key]:
    return _pair(ldm, diffusers, (after, before, size, size))


def _linear(
    ldm: str, diffusers: str | None, before: int, after: int, bias: bool = True
) -> list[Key]:
    return _pair(ldm, diffusers, (after, before), bias)


def _norm(ldm: str, diffusers: str | None, width: int) -> list[Key]:
    return _pair(ldm, diffusers, (width,))


_UNET_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}


def _residual(block: Block, time: int | None, names: Mapping[str, str]) -> list[Key]:
    def both(name: str) -> tuple[str, str]:
        return f"{block.ldm}.{names[name]}", f"{block.diffusers}.{name}"

    keys = _norm(*both("norm1"), block.before)
    keys += _conv(*both("conv1"), block.before, block.after)
    if time is not None:
        keys += _linear(*both("time_emb_proj"), time, block.after)
    keys += _norm(*both("norm2"), block.after)
    keys += _conv(*both("conv2"), block.after, block.after)
    if block.before != block.after:
        keys += _conv(*both("conv_shortcut"), block.before, block.after, 1)
    return keys


def _transformer(block: Block, context: int) -> list[Key]:
    """A spatial transformer of depth 1. Inside, both sides use the same names."""
    width = block.after

    def both(name: str) -> tuple[str, str]:
        return f"{block.ldm}.{name}", f"{block.diffusers}.{name}"

    inner = "transformer_blocks.0"
    keys = _norm(*both("norm"), width) + _conv(*both("proj_in"), width, width, 1)
    for name, source in (("attn1", width), ("attn2", context)):
        keys += _linear(*both(f"{inner}.{name}.to_q"), width, width, bias=False)
        keys += _linear(*both(f"{inner}.{name}.to_k"), source, width, bias=False)
        keys += _linear(*both(f"{inner}.{name}.to_v"), source, width, bias=False)
        keys += _linear(*both(f"{inner}.{name}.to_out.0"), width, width)
    keys += _linear(*both(f"{inner}.ff.net.0.proj"), width, 8 * width)  # GEGLU: 4 and its gate
    keys += _linear(*both(f"{inner}.ff.net.2"), 4 * width, width)
    for i in (1, 2, 3):
        keys += _norm(*both(f"{inner}.norm{i}"), width)
    return keys + _conv(*both("proj_out"), width, width, 1)


def _vae_middle(side: str, width: int) -> list[Key]:
    ldm, diffusers = f"{side}.mid", f"{side}.mid_block"
    keys = []
    for i in (0, 1):
        names = f"{ldm}.block_{i + 1}", f"{diffusers}.resnets.{i}"
        keys += _residual(Block("residual", *names, width, width), None, _VAE_RESIDUAL)
    ldm, diffusers = f"{ldm}.attn_1", f"{diffusers}.attentions.0"
    keys += _norm(f"{ldm}.norm", f"{diffusers}.group_norm", width)
    pairs = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for ldm_name, diffusers_name in pairs.items():
        # 1x1 convolutions in ldm, linear layers in diffusers
        for key in _conv(f"{ldm}.{ldm_name}", f"{diffusers}.{diffusers_name}", width, width, 1):
            shape = key.ldm_shape
            keys.append(
                key._replace(diffusers_shape=shape[:2] if math.prod(shape) > width else shape)
            )
    return keys
