"""Flow in CONDITIONING: how the flow of a clip travels to the sampler and becomes a condition.

A label rides in the dictionary of a conditioning entry. When sampling starts it moves, as a
placeholder, among the conditions that core passes to the model; when the areas of all entries
are known it is encoded, once a run, into rows of one table of flow tokens. The model is passed
each frame's row number, which core batches, repeats and slices with the latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.utils
import torch
from torch import Tensor

from ...s2dm.flow import FlowField
from ...s2dm.models import FlowAdapter

LABEL = "s2dm_flow"
"""Key of a `FlowLabel`, or of None for the null label, in a conditioning entry."""
TABLES = "s2dm_tokens"
"""Key of each adapter's table in the transformer options of a run: (rows, tokens, width), null
first."""
ROW = "s2dm_row"
WINDOW = "s2dm_window"
MASK = "s2dm_mask"

_ENCODED_AT_ONCE = 8
_ALWAYS = (float("inf"), float("-inf"))


class FlowLabelError(ValueError):
    """Flow and latents that don't fit each other."""


@dataclass(frozen=True, eq=False)
class FlowLabel:
    """The flow label y of one conditioning entry (paper, section 3.3).

    flow: of N frames and any size; it is resized to the latents.
    strength: 0 is the null label, 1 the flow as it is; tokens = null + strength * (flow - null).
    start, end: part of the noise schedule, 0 (all noise) to 1 (none), that sees the flow; the
        null label elsewhere. A start of None is the checkpoint's, resolved as a run begins.
    mask: (1 or N, H, W) in [0, 1], where the picture sees the flow; None for everywhere.
    """

    flow: FlowField
    strength: float = 1.0
    start: float | None = 0.0
    end: float = 1.0
    mask: Tensor | None = None


class _SharedText(comfy.conds.CONDCrossAttn):
    """A prompt that all frames share. Core would copy it for each of them; a view will do."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> _SharedText:
        return self._copy_with(self.cond.expand(batch_size, -1, -1))


class _LabelCondition:
    """A label among the model conditions of an entry, until the areas of all entries are known.

    Core copies the model conditions of an entry to the ones that it makes up, for instance to
    pair each area with its opposite, so the label goes where it belongs.
    """

    def __init__(self, label: FlowLabel | None) -> None:
        self.label = label


def attach_labels(conditions: dict[str, list[dict[str, Any]]], frames: int) -> None:
    """Put the labels among the model conditions of each entry; null where there is none.

    Raises:
        FlowLabelError: a flow of another number of frames than the latents have.
    """
    for entries in conditions.values():
        for entry in entries:
            label = entry.get(LABEL)
            if label is not None and label.flow.frames != frames:
                raise FlowLabelError(
                    f"S2DM flow: expected a flow of {frames} frames, one for each latent, got "
                    f"{label.flow.frames}. Sample the LATENT that Encode Flow (S2DM) gives, or "
                    "make the flow from a clip of as many frames."
                )
            model_conditions = {**entry.get("model_conds", {}), ROW: _LabelCondition(label)}
            entry["model_conds"] = model_conditions


def encode_labels(
    conditions: dict[str, list[dict[str, Any]]],
    adapter: FlowAdapter,
    sampling: Any,
    size: tuple[int, int],
    factor: int,
    place: dict[str, Any],
) -> Tensor:
    """Replace every label by its rows in a table of tokens, its window of sigmas and its mask.

    Args:
        conditions: of the sampler, their areas resolved; changed in place.
        adapter: encodes the flow.
        sampling: core's model_sampling, which turns parts of the run into sigmas.
        size: (h, w) of the latents.
        factor: pixels along each side of one latent.
        place: `device` and `dtype` of the tokens.

    Returns:
        The table, (rows, tokens, width). Row 0 is the null label.
    """
    entries = list(_labelled(conditions))
    labels = [entry[ROW].label for _, entry in entries]
    masked = any(label is not None and label.mask is not None for label in labels)
    null = adapter.null_tokens(1).to(**place)
    table = [null]
    count = 1
    rows = {id(None): torch.zeros(1, 1, dtype=torch.long, device=place["device"])}
    for (area, entry), label in zip(entries, labels, strict=True):
        key = id(None) if label is None else (id(label), area)
        if key not in rows:
            tokens = _tokens(label, adapter, area or (*size, 0, 0), size, factor, place)
            table.append(torch.lerp(null, tokens, label.strength))
            rows[key] = torch.arange(count, count + len(tokens), device=place["device"])[:, None]
            count += len(tokens)
        entry[ROW] = comfy.conds.CONDRegular(rows[key])
        text = entry.get("c_crossattn")
        if type(text) is comfy.conds.CONDCrossAttn and text.cond.shape[0] == 1:
            entry["c_crossattn"] = _SharedText(text.cond)
        entry[WINDOW] = comfy.conds.CONDRegular(_window(label, sampling, place["device"]))
        if masked:
            entry[MASK] = comfy.conds.CONDNoiseShape(_mask(label, size, place))
    return torch.cat(table)


def remove_labels(conditions: dict[str, list[dict[str, Any]]]) -> None:
    """Take the labels out of the conditions of a model that follows no flow."""
    for _, entry in list(_labelled(conditions)):
        del entry[ROW]


def _labelled(
    conditions: dict[str, list[dict[str, Any]]],
) -> Iterator[tuple[tuple[int, ...] | None, dict[str, Any]]]:
    for entries in conditions.values():
        for entry in entries:
            model_conditions = entry.get("model_conds", {})
            if isinstance(model_conditions.get(ROW), _LabelCondition):
                area = entry.get("area")
                yield (tuple(area) if area is not None else None), model_conditions


def _tokens(
    label: FlowLabel,
    adapter: FlowAdapter,
    area: tuple[int, ...],
    size: tuple[int, int],
    factor: int,
    place: dict[str, Any],
) -> Tensor:
    """Tokens of a label as an area (height, width, top, left) of the latents sees it."""
    whole = tuple(area) == (*size, 0, 0)
    parts = []
    for frames in torch.arange(label.flow.frames).split(_ENCODED_AT_ONCE):
        # Frame 1 leads every field, and the part of a clip that lacks it too.
        part = label.flow.select([0, *frames.tolist()])
        if not whole:
            part = part.resize(size[0] * factor, size[1] * factor)
            part = part.crop(*(side * factor for side in area))
        # At the size that the encoder works in, as in training, and straight to it where the
        # whole picture is seen: each resize takes off sharpness.
        condition = part.condition(*adapter.encoder.size)[1:]
        parts.append(adapter.encode(condition.to(**place)))
    return torch.cat(parts)


def _window(label: FlowLabel | None, sampling: Any, device: torch.device) -> Tensor:
    """(1, 2): the highest and the lowest sigma at which the label holds."""
    high, low = _ALWAYS
    if label is not None and label.start > 0:
        high = float(sampling.percent_to_sigma(label.start))
    if label is not None and label.end < 1:
        low = float(sampling.percent_to_sigma(label.end))
    return torch.tensor([[high, low]], device=device)


def _mask(label: FlowLabel | None, size: tuple[int, int], place: dict[str, Any]) -> Tensor:
    if label is None or label.mask is None:
        return torch.ones(1, 1, *size, **place)
    mask = label.mask.reshape(-1, 1, *label.mask.shape[-2:]).to(**place)
    return comfy.utils.common_upscale(mask, size[1], size[0], "bilinear", "disabled")
