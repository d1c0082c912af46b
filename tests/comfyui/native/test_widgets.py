"""Every number that a widget shows can be typed into it and comes out as it was."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from comfyui_graph import widget_values

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.flow import FlowField
from s2dm.models import read_config

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
NUMBERS = {"INT", "FLOAT"}
# What few change: widgets that newer versions fold away, by node.
FOLDED = {
    ("S2DMCheckpointLoader", "frames_at_once"),
    ("S2DMApplyFlowAdapter", "frames_at_once"),
    ("S2DMGenerateFlow", "sampler_name"),
    ("S2DMEncodeFlow", "start_percent"),
    ("S2DMEncodeFlow", "end_percent"),
    ("S2DMEncodeFlow", "guide_flow"),
    ("S2DMAnchorToReference", "reference_attention"),
    ("S2DMAnchorToReference", "key_frame"),
    ("S2DMEditFlow", "left"),
    ("S2DMEditFlow", "top"),
    ("S2DMPoseToFlow", "least_confidence"),
    ("S2DMSharedNoiseKSampler", "share"),
    *(
        ("S2DMTrainFlowAdapter", name)
        for name in (
            "clips_per_step",
            "frames_per_clip",
            "frames_at_once",
            "precision",
            "gradient_checkpointing",
            "save_every",
            "preview_every",
            "resume",
            "lora_rank",
        )
    ),
    *(
        ("S2DMTrainFlowGenerator", name)
        for name in (
            "clips_per_step",
            "clips_at_once",
            "precision",
            "save_every",
            "preview_every",
            "resume",
        )
    ),
    ("S2DMSharedNoise", "share"),
    ("S2DMSharedNoiseSampler", "share"),
}


def numbers(node):
    """The numeric inputs of a node by name."""
    inputs = node.GET_SCHEMA().inputs
    return {socket.id: socket for socket in inputs if socket.get_io_type() in NUMBERS}


def reachable(socket, value):
    """Whether the arrows of a widget, and its rounding on Enter, come to a value.

    The interface counts steps from the least value, and shows as many decimals as the step has.
    """
    if socket.id in ("seed", "noise_seed"):
        return True
    steps = (value - socket.min) / (socket.step or 1)
    return socket.min <= value <= socket.max and math.isclose(steps, round(steps), abs_tol=1e-6)


def test_defaults_are_reached_by_steps(node_classes):
    seen = 0
    for node in node_classes.values():
        for name, socket in numbers(node).items():
            assert reachable(socket, socket.default), f"{node.__name__}.{name}"
            # Otherwise the step is the interface's, which has changed.
            assert socket.get_io_type() == "INT" or socket.step, f"{node.__name__}.{name}"
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_values_of_the_templates_are_reached_by_steps(node_classes, path):
    seen = 0
    for entry in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if entry["type"] not in node_classes:
            continue
        node = node_classes[entry["type"]]
        values = dict(widget_values(entry, node.GET_NODE_INFO_V1()["input"]))
        for name, socket in numbers(node).items():
            if name in values:
                assert reachable(socket, values[name]), f"{entry['type']}.{name}: {values[name]}"
                seen += 1
    assert seen


def test_what_the_bundled_checkpoint_recommends_can_be_typed_in(node_classes):
    advice = read_config(DEFAULT_CHECKPOINT).sampling
    sampler = numbers(node_classes["S2DMSharedNoiseKSampler"])
    encode = numbers(node_classes["S2DMEncodeFlow"])
    assert reachable(sampler["cfg"], advice.guidance_scale)
    assert reachable(sampler["steps"], advice.steps)
    assert reachable(encode["start_percent"], advice.flow_start)


def test_what_few_change_is_folded_away(node_classes):
    """In versions that can."""
    folded = {
        (node.GET_SCHEMA().node_id, socket.id)
        for node in node_classes.values()
        for socket in node.GET_SCHEMA().inputs
        if getattr(socket, "advanced", None)
    }
    assert not folded or folded == FOLDED


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_a_template_explains_is_not_folded_away(node_classes, path):
    """A widget that the note names is seen on a node of the template as it opens."""
    entries = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (note,) = (entry for entry in entries if entry["type"] == "MarkdownNote")
    named = set(re.findall(r"\*([a-z_]+)\*", note["widgets_values"][0]))
    kinds = [entry["type"] for entry in entries if entry["type"] in node_classes]
    widgets = {
        (kind, socket.id) for kind in kinds for socket in node_classes[kind].GET_SCHEMA().inputs
    }
    seen = {name for _, name in widgets - FOLDED}
    hidden = {name for _, name in widgets & FOLDED} - seen
    assert not named & hidden


def test_a_number_that_is_none_is_refused_by_every_node(node_classes):
    """ComfyUI lets NaN through, from a node that computes numbers or from a prompt's JSON.

    It is the first thing that a node looks at, so nothing else need be connected.
    """
    seen = 0
    for node in node_classes.values():
        schema = node.GET_SCHEMA()
        defaults = {socket.id: getattr(socket, "default", None) for socket in schema.inputs}
        for name, socket in numbers(node).items():
            if socket.get_io_type() == "FLOAT":
                with pytest.raises(ValueError) as error:
                    node.execute(**{**defaults, name: math.nan})
                expected = f"{schema.display_name}: {name}: expected a finite number, got nan."
                assert str(error.value) == expected
                seen += 1
    assert seen >= 20


def test_a_socket_that_brings_nothing_is_named_by_every_node(node_classes):
    """A switch of another pack hands on None where its own input is empty."""
    own_words = {"S2DMGenerateFlow.flow_generator": "expected a flow generator"}
    seen = 0
    for node in node_classes.values():
        schema = node.GET_SCHEMA()
        sockets = [one for one in schema.inputs if not hasattr(one, "default") and not one.optional]
        given = {one.id: getattr(one, "default", None) for one in schema.inputs}
        for one in sockets:
            flow = one.get_io_type() == "S2DM_FLOW"
            given[one.id] = FlowField.zeros(2, 16, 16) if flow else object()
        for socket in sockets:
            values = {**given, socket.id: None}
            if schema.is_input_list:
                values = {name: [value] for name, value in values.items()}
            with pytest.raises(ValueError) as error:
                node.execute(**values)
            usual = f"{socket.id}: expected something"
            assert own_words.get(f"{schema.node_id}.{socket.id}", usual) in str(error.value)
            assert str(error.value).startswith(schema.display_name)
            seen += 1
    assert seen >= 25
