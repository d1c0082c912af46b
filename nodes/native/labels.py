"""Flow in CONDITIONING: how the flow of a clip travels to the sampler and becomes a condition.

A label rides in the dictionary of a conditioning entry. When sampling starts it moves, as a
placeholder, among the conditions that core passes to the model; when the areas of all entries
are known it is encoded, once a run, into rows of one table of flow tokens. The model is passed
each frame's row number, which core batches, repeats and slices with the latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.utils
import torch
from torch import Tensor

from ...s2dm.flow import FlowField
from ...s2dm.models import LATENT_CELL, FlowAdapter

LABEL = "s2dm_flow"
"""Key of a `FlowLabel`, or of None for the null label, in a conditioning entry."""
TABLES = "s2dm_tokens"
"""Key of each adapter's tables in the transformer options of a run (see `encode_labels`)."""
_ROW, _WINDOW, _MASK = "s2dm_row", "s2dm_window", "s2dm_mask"
"""Keys among the model conditions of an entry: rows of the table, sigmas, and where it is seen."""
Size = tuple[int, int]
Tables = dict[Size | None, Tensor]

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
    alone: the last of the frames is sampled, and no other one.
    """

    flow: FlowField
    strength: float = 1.0
    start: float | None = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    alone: bool = False

    @property
    def num_frames(self) -> int:
        """How many latents are sampled beside it."""
        return 1 if self.alone else self.flow.num_frames


def labels_of(conditions: dict[str, list[dict[str, Any]]]) -> Iterator[FlowLabel]:
    """The labels of all entries."""
    for entries in conditions.values():
        yield from (entry[LABEL] for entry in entries if entry.get(LABEL) is not None)


def of_frame(entry: dict[str, Any], index: int, start: float | None = None) -> dict[str, Any]:
    """A conditioning entry for one frame alone, whose labels may be attached already.

    index: of the frame, counted from 0. start: of its label in place of its own, if given.
    """
    label, told = entry.get(LABEL), dict(entry.get("model_conds", {}))
    entry = {**entry, "model_conds": told}
    if label is not None:
        mask = label.mask
        if mask is not None:
            mask = mask.reshape(-1, *mask.shape[-2:])
            mask = mask[index : index + 1] if len(mask) > 1 else mask
        entry[LABEL] = dataclasses.replace(
            label,
            flow=label.flow.select([0, index]),
            start=label.start if start is None else start,
            mask=mask,
            alone=True,
        )
    if _ROW in told:
        told[_ROW] = _LabelCondition(entry.get(LABEL))
    return entry


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


def check_labels(conditions: dict[str, list[dict[str, Any]]], num_frames: int) -> None:
    """Raise FlowLabelError where a flow has another number of frames than the latents."""
    for label in labels_of(conditions):
        if label.num_frames != num_frames:
            raise FlowLabelError(
                f"S2DM flow: expected a flow of {num_frames} frames, one for each latent, got "
                f"{label.num_frames}. Sample the LATENT that Encode Flow (S2DM) gives, or "
                "make flow of as many frames."
            )


def attach_labels(conditions: dict[str, list[dict[str, Any]]], num_frames: int) -> None:
    """Put the labels among the model conditions of each entry; null where there is none.

    Raises:
        FlowLabelError: a flow of another number of frames than the latents have.
    """
    check_labels(conditions, num_frames)
    for entries in conditions.values():
        for entry in entries:
            row = _LabelCondition(entry.get(LABEL))
            entry["model_conds"] = {**entry.get("model_conds", {}), _ROW: row}


def encode_labels(
    conditions: dict[str, list[dict[str, Any]]],
    adapter: FlowAdapter,
    model: comfy.model_base.BaseModel,
    latents: Tensor,
) -> Tables:
    """Replace every label by its rows in a table of tokens, its window of sigmas and its mask.

    Args:
        conditions: of the sampler, their areas resolved; changed in place.
        adapter: encodes the flow.
        model: core's, which turns parts of the run into sigmas.
        latents: of the run, (N, C, h, w), on the device to encode on.

    Returns:
        By the size of the latents that an entry sees, its table, (rows, tokens, width). Row 0 is
        the null label. Without spatial features there is one, for every size.
    """
    entries = list(_labelled(conditions))
    labels = [entry[_ROW].label for _, entry in entries]
    masked = any(label is not None and label.mask is not None for label in labels)
    size = tuple(latents.shape[-2:])
    like = latents.new_empty(0, dtype=model.manual_cast_dtype or model.get_dtype())
    tables: dict[Size | None, list[Tensor]] = {}
    rows = {id(None): torch.zeros(1, 1, dtype=torch.long, device=like.device)}
    for (area, entry), label in zip(entries, labels, strict=True):
        within = size if area is None else _within(area, size)
        null = adapter.null_tokens(1, within).to(like)
        table = tables.setdefault(_size_of_table(adapter, within), [null])
        key = id(None) if label is None or not label.strength else (id(label), area)
        if key not in rows:
            seen, count = _seen(label.flow, area, size), sum(map(len, table))
            tokens = adapter.tokens(seen, within, like)
            table.append(torch.lerp(null, tokens, label.strength))
            numbers = torch.arange(count, count + len(tokens))
            numbers[_as_frame_1(seen)] = count
            numbers = numbers[-1:] if label.alone else numbers
            rows[key] = numbers[:, None].to(like.device)
        entry[_ROW] = comfy.conds.CONDRegular(rows[key])
        text = entry.get("c_crossattn")
        if type(text) is comfy.conds.CONDCrossAttn and text.cond.shape[0] == 1:
            entry["c_crossattn"] = _SharedText(text.cond)
        entry[_WINDOW] = comfy.conds.CONDRegular(_window(label, model.model_sampling, like.device))
        if masked:
            entry[_MASK] = comfy.conds.CONDNoiseShape(_mask(label, size, like))
    return {key: torch.cat(table) for key, table in tables.items()}


def settle_rows(t: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
    """The conditions of a call with the rows that hold at its sigmas t, (B,), and no windows.

    Frames that see the same then have the same row. Without labels: the conditions as they are.
    """
    row, window = (conditions.get(name) for name in (_ROW, _WINDOW))
    if row is None or window is None:
        return conditions
    inside = (t <= window[:, 0]) & (t >= window[:, 1])
    rest = {name: value for name, value in conditions.items() if name != _WINDOW}
    # Row 0 is the null label.
    return {**rest, _ROW: torch.where(inside[:, None], row, 0)}


def tokens_of_call(
    adapter: FlowAdapter,
    options: dict[str, Any],
    t: Tensor,
    size: Size,
    conditions: dict[str, Any],
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What a call of the U-Net is to see of the flow.

    Args:
        adapter: of the model that is called.
        options: core's transformer options, with the tables of the run.
        t: sigmas of the call, (B,).
        size: height and width of the latents of the call.
        conditions: of the call, from `settle_rows`.

    Returns:
        Tokens, (B, tokens, width); where the picture sees them, (B, 1, h, w), or None for
        everywhere; and the conditions without ours.

    Raises:
        FlowLabelError: latents of a size that no flow was encoded for.
    """
    row, mask = (conditions.get(name) for name in (_ROW, _MASK))
    rest = {k: v for k, v in conditions.items() if k not in (_ROW, _MASK)}
    tables = options.get(TABLES, {})
    # On a further GPU the model and its adapter are copies.
    by_size = tables.get(adapter, next(iter(tables.values()), None))
    if row is None or by_size is None:
        return adapter.null_tokens(1, size).to(t.device).expand(len(t), -1, -1), None, rest
    table = by_size.get(_size_of_table(adapter, size))
    if table is None:
        raise FlowLabelError(
            f"S2DM flow: expected latents of one of the sizes {sorted(by_size)} (height, width), "
            f"as the flow was encoded for, got {size}. An adapter with spatial features sees no "
            "tiles: leave out the node that samples in tiles, or use an adapter of channel fusion."
        )
    # Another GPU may run a part of the conditions.
    return table.to(t.device)[row[:, 0]], mask, rest


def remove_labels(conditions: dict[str, list[dict[str, Any]]]) -> None:
    """Take the labels out of the conditions of a model that follows no flow."""
    for _, entry in list(_labelled(conditions)):
        del entry[_ROW]


def _labelled(
    conditions: dict[str, list[dict[str, Any]]],
) -> Iterator[tuple[tuple[int, ...] | None, dict[str, Any]]]:
    for entries in conditions.values():
        for entry in entries:
            model_conditions = entry.get("model_conds", {})
            if isinstance(model_conditions.get(_ROW), _LabelCondition):
                area = entry.get("area")
                yield (tuple(area) if area is not None else None), model_conditions


def _size_of_table(adapter: FlowAdapter, size: Size) -> Size | None:
    """Spatial features differ in number from size to size, the tokens of a grid don't."""
    return tuple(size) if adapter.config.spatial else None


def _within(area: tuple[int, ...], size: Size) -> Size:
    """Height and width of an area (height, width, top, left), which core cuts at the border."""
    height, width, top, left = area
    return min(height, size[0] - top), min(width, size[1] - left)


def _seen(flow: FlowField, area: tuple[int, ...] | None, size: tuple[int, int]) -> FlowField:
    """The flow as an area (height, width, top, left) of latents of some size sees it."""
    # Straight from its own size where the whole is seen: each resize takes off sharpness.
    if area is None or tuple(area) == (*size, 0, 0):
        return flow
    size, area = ([side * LATENT_CELL for side in sides] for sides in (size, area))
    return flow.resize(*size).crop(*area)


def _as_frame_1(flow: FlowField) -> Tensor:
    """Which frames have the flow and the occlusion of frame 1, (N,) bool."""
    parts = (flow.displacement, flow.occlusion)
    equal = [(part == part[:1]).flatten(1).all(1) for part in parts]
    return (equal[0] & equal[1]).cpu()


def _window(label: FlowLabel | None, sampling: Any, device: torch.device) -> Tensor:
    """(1, 2): the highest and the lowest sigma at which the label holds."""
    high, low = _ALWAYS
    if label is not None and label.start > 0:
        high = float(sampling.percent_to_sigma(label.start))
    if label is not None and label.end < 1:
        low = float(sampling.percent_to_sigma(label.end))
    return torch.tensor([[high, low]], device=device)


def _mask(label: FlowLabel | None, size: tuple[int, int], like: Tensor) -> Tensor:
    if label is None or label.mask is None:
        return like.new_ones(1, 1, *size)
    mask = label.mask.reshape(-1, 1, *label.mask.shape[-2:]).to(like)
    return comfy.utils.common_upscale(mask, size[1], size[0], "bilinear", "disabled")
