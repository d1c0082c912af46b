"""The names and shapes under which Stable Diffusion 1.x circulates, brought to those of our file.

Tools have written the same weights as diffusers names them, old and new, or half and half, with
1x1 convolutions as matrices, without CLIP's `text_model.`, under further prefixes, and beside a
moving average or whatever else training kept. All of that is the same model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from .checkpoint import PARTS
from .config.checkpoint import S2DMConfig
from .keys import Key, Shape

STABLE_DIFFUSION = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "VAE"}
"""The parts of Stable Diffusion, and what people call them."""

# What wrappers of a whole model put before its names, any number of times.
_LEAD = r"(?:(?:model|module|state_dict)\.)*"
_WHOLE_NAMES = {
    "unet": re.compile(_LEAD + r"(?:diffusion_model|unet)\.(.+)"),
    "text_encoder": re.compile(
        _LEAD + r"(?:(?:cond_stage_model|clip_l)\.(?:transformer\.)?|text_encoder\.)(.+)"
    ),
    "vae": re.compile(_LEAD + r"(?:first_stage_model|vae)\.(.+)"),
}
_TEXT_MODEL = "text_model."
# The one attention layer on each side of the VAE: of ldm, diffusers, and diffusers before 0.18.
_ATTENTION_PLACES = (".mid.attn_1.", ".mid_block.attentions.0.")
_ATTENTION_NAMES = (
    ("norm", "group_norm"),
    ("q", "to_q", "query"),
    ("k", "to_k", "key"),
    ("v", "to_v", "value"),
    ("proj_out", "to_out.0", "proj_attn"),
)

# Other models, told by a part of a name.
_OTHERS = {
    "conditioner.": "SDXL",
    "label_emb.": "SDXL",
    "add_embedding.": "SDXL",
    "text_encoder_2.": "SDXL",
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "motion_modules.": "a motion module of AnimateDiff",
    "control_model.": "a ControlNet",
}
_FIRST = re.compile(r".*(?:\.input_blocks\.0\.0|unet\.conv_in)\.weight")
_OTHER_INPUTS = {8: "an InstructPix2Pix model", 9: "an inpainting model"}
_CONTEXT = re.compile(r".*\.attn2\.to_k\.weight")
_OTHER_CONTEXTS = {1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "SDXL's refiner"}


class SpellingError(ValueError):
    """Weights that are not, or not all of, Stable Diffusion 1.x; the message begins with "got"."""


def holds_unet(names: Iterable[str]) -> bool:
    """Whether weights of these names hold the U-Net of some Stable Diffusion."""
    inside = (match[1] for name in names if (match := _WHOLE_NAMES["unet"].fullmatch(name)))
    return any(name.startswith(("input_blocks.", "down_blocks.")) for name in inside)


def spelled_our_way(
    weights: Mapping[str, Tensor], config: S2DMConfig
) -> dict[str, dict[str, Tensor]]:
    """Stable Diffusion's three parts under the names and in the shapes of our file.

    Args:
        weights: of a whole model, as some tool has named and shaped them. What doesn't belong to
            it is left out.
        config: its sizes.

    Returns:
        For each part its weights, in their types, as `save_checkpoint` wants them.

    Raises:
        SpellingError: a part or a weight is missing, or of another model.
    """
    there: dict[str, dict[str, str]] = {part: {} for part in STABLE_DIFFUSION}
    for name in sorted(weights, key=len):  # the plainest of several comes first
        for part, pattern in _WHOLE_NAMES.items():
            if match := pattern.fullmatch(name):
                inner = match[1].removeprefix(_TEXT_MODEL)
                there[part].setdefault(inner, name)
    lacking = [STABLE_DIFFUSION[part] for part, names in there.items() if not names]
    if "U-Net" not in lacking and (other := _other_model(weights)):
        raise SpellingError(f"got {other}")
    if lacking:
        raise SpellingError(
            f"got no {' and no '.join(lacking)}. Use a file that holds all of it, or a folder of "
            "diffusers"
        )
    return {part: _part(part, names, weights, config) for part, names in there.items()}


def _part(
    part: str, names: Mapping[str, str], weights: Mapping[str, Tensor], config: S2DMConfig
) -> dict[str, Tensor]:
    state, missing = {}, []
    for key in PARTS[part].keys(getattr(config, part)):
        name = next((names[other] for other in _spellings(key) if other in names), None)
        if name is None:
            missing.append(PARTS[part].prefix + key.ldm)
            continue
        weight = weights[name]
        if not weight.is_floating_point():
            raise SpellingError(f"got {weight.dtype} in {name}: quantised. Use the original")
        if _without_ones(weight.shape) != _without_ones(key.ldm_shape):
            raise SpellingError(f"with {key.ldm_shape} at {name}, got {tuple(weight.shape)}")
        state[key.ldm] = weight.reshape(key.ldm_shape)
    if missing:
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise SpellingError(
            f"got a {STABLE_DIFFUSION[part]} without {missing[0]}{more}. The file is damaged or of "
            "another model"
        )
    return state


def _spellings(key: Key) -> Iterator[str]:
    """All names of one weight within its part, `text_model.` taken off."""
    yield key.ldm.removeprefix(_TEXT_MODEL)
    yield key.diffusers.removeprefix(_TEXT_MODEL)
    side, place, rest = key.ldm.partition(_ATTENTION_PLACES[0])
    if not place:
        return
    module, _, kind = rest.rpartition(".")
    for names in _ATTENTION_NAMES:
        if module == names[0]:
            for place in _ATTENTION_PLACES:
                yield from (f"{side}{place}{name}.{kind}" for name in names)


def _without_ones(shape: Iterable[int]) -> Shape:
    """A shape without ones at its end: a 1x1 convolution has as many numbers as a matrix."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _other_model(weights: Mapping[str, Tensor]) -> str | None:
    """Which other model these are the weights of, if it can be told."""
    for name, weight in weights.items():
        for part, model in _OTHERS.items():
            if part in name:
                return f"{model} (it holds {name})"
        for pattern, models in ((_FIRST, _OTHER_INPUTS), (_CONTEXT, _OTHER_CONTEXTS)):
            if weight.ndim > 1 and weight.shape[1] in models and pattern.fullmatch(name):
                return f"{models[weight.shape[1]]} (shape {tuple(weight.shape)} at {name})"
    return None
