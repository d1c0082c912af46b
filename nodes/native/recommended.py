"""How a checkpoint recommends to sample: carried by its MODEL, asked for when sampling starts.

A widget may leave a setting to the checkpoint. The sampler's own are read from the MODEL; those
of a flow label are resolved when a run begins, because before it no node knows which model will
sample the label.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import comfy.model_patcher

from ...s2dm.models import SamplingConfig
from .labels import LABEL, FlowLabel, FlowLabelError

AUTO = "s2dm_auto"
"""Key of a conditioning entry whose flow is guided as the checkpoint recommends: a negative."""
_KEY = "s2dm_sampling"
"""Key of the recommendation among the attachments of a MODEL, which its copies keep."""

Entry = dict[str, Any]


def recommend(model: comfy.model_patcher.ModelPatcher, sampling: SamplingConfig) -> None:
    """Put a checkpoint's recommendation on the MODEL that is made from it."""
    model.set_attachments(_KEY, sampling)


def recommended(model: comfy.model_patcher.ModelPatcher) -> SamplingConfig:
    """What the checkpoint of a MODEL recommends; the paper's settings for any other MODEL."""
    return recommendation_of(model) or SamplingConfig()


def recommendation_of(model: comfy.model_patcher.ModelPatcher) -> SamplingConfig | None:
    """What the checkpoint of a MODEL recommends, if it is one of ours."""
    return model.get_attachment(_KEY)


def resolve_labels(
    conditions: dict[str, list[Entry]], sampling: SamplingConfig, cfg: float | None
) -> None:
    """Give every label the start, and every negative the flow, that a checkpoint recommends.

    Args:
        conditions: of a guider, by their names; changed in place.
        sampling: the recommendation.
        cfg: guidance scale of the run, None for a guider that has no single one.

    Raises:
        FlowLabelError: a label would end before it starts, or the guider can't guide flow apart
            from the prompt, as the checkpoint wants it.
    """
    # An entry with the same label as another one keeps it, so that it is encoded once.
    labels: dict[FlowLabel, FlowLabel] = {}
    negatives: list[tuple[str, Entry]] = []
    for name, entries in conditions.items():
        for entry in entries:
            label = entry.get(LABEL)
            if label is not None:
                if label not in labels:
                    labels[label] = _started(label, sampling.flow_start)
                entry[LABEL] = labels[label]
            if entry.pop(AUTO, False):
                negatives.append((name, entry))
    if not negatives:
        return
    scale = sampling.flow_guidance_scale
    usual = set(conditions) == {"positive", "negative"}
    if scale not in (None, 1) and scale != cfg and (cfg is None or not usual):
        raise FlowLabelError(
            "S2DM flow: expected a guider with one cfg, one positive and one negative prompt, "
            f"because the checkpoint recommends to guide flow by {scale:g}, apart from the prompt; "
            "got another guider. Use CFGGuider or a KSampler, or set guide_flow of Encode Flow "
            "(S2DM) to on or off."
        )
    for name, entry in negatives:
        place = next(at for at, other in enumerate(conditions[name]) if other is entry)
        conditions[name][place : place + 1] = _negatives(entry, scale, cfg)
        if cfg is not None and scale is not None and math.isclose(cfg, 1) and scale != 1:
            # At cfg 1 core leaves the negative out, so what flow adds goes to the positive.
            conditions["positive"] += [
                _weighted(entry, scale - 1),
                {**_weighted(entry, 1 - scale), LABEL: None},
            ]


def _started(label: FlowLabel, recommended_start: float) -> FlowLabel:
    start = recommended_start if label.start is None else label.start
    if start > label.end:
        raise FlowLabelError(
            f"S2DM flow: expected an end_percent of at least {start:g}, where the checkpoint "
            f"recommends that flow starts, got {label.end:g}. Raise end_percent, or set "
            "start_percent below it."
        )
    return dataclasses.replace(label, start=start)


def _negatives(entry: Entry, scale: float | None, cfg: float | None) -> Iterator[Entry]:
    """The negative prompt beside the null label, beside the flow, or a weighted mean of both.

    With ε(∅,∅) and ε(y,∅) in these parts, core's guidance by `cfg` = s is that of the pipeline,
    ε(∅,∅) + s_y·(ε(y,∅) − ε(∅,∅)) + s·(ε(y,c) − ε(y,∅)), for any scale s_y of the flow.
    """
    null = {**entry, LABEL: None}
    if scale is None or scale == cfg:
        yield null
    elif scale == 1 or cfg is None or math.isclose(cfg, 1):
        yield entry
    else:
        yield _weighted(entry, (cfg - scale) / (cfg - 1))
        yield _weighted(null, (scale - 1) / (cfg - 1))


def _weighted(entry: Entry, weight: float) -> Entry:
    """The entry with a share in core's mean over the entries of a prompt."""
    return {**entry, "strength": entry.get("strength", 1.0) * weight, "uuid": uuid4()}
