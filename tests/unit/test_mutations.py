"""Damaged files: any change to a checkpoint or a flow file loads, or is refused in plain words.

The changes are seeded, so that a failure can be made again: the message has the number of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import TINY, UNET, write_random_checkpoint

from s2dm.flow import FlowError, FlowField, load_flow, save_flow
from s2dm.models import (
    CheckpointError,
    FlowAdapter,
    FlowAdapterConfig,
    FlowGenerator,
    load_checkpoint,
)

UNET = dataclasses.replace(UNET, channel_mult=(1,), attention_levels=(True,), context_dim=32)
CONFIG = dataclasses.replace(
    TINY,
    unet=UNET,
    vae=dataclasses.replace(TINY.vae, channel_mult=(1,)),
    text_encoder=dataclasses.replace(
        TINY.text_encoder, hidden_size=32, layers=1, intermediate_size=32, max_length=8
    ),
    flow_adapter=FlowAdapterConfig.for_unet(
        UNET, fusion="channel+spatial", width=32, hidden=32, grid=(2, 2)
    ),
    flow_generator=dataclasses.replace(
        TINY.flow_generator, text_dim=32, model_channels=8, channel_mult=(1,)
    ),
)
"""All parts, and as few weights as they can have: a mutation is tried in milliseconds."""

SECONDS = 25  # after which no further mutation is tried, however slow the machine

Mutation = Callable[[random.Random, bytes], bytes]

VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 31, 2**15, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64,
    10**30, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("nan"), "", "x", "F32", "I64", "clip",
    [], {}, [1], [[1]], [2**62, 2**62], {"kind": "bpe"}, [["input_1_0", 2**40]], [["", 1]],
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "tiny.safetensors"
    return write_random_checkpoint(path, CONFIG).read_bytes()


@pytest.fixture(scope="module")
def flows(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("flows")
    moved = torch.rand(1, 2, 6, 7, generator=torch.Generator().manual_seed(0)) * 3
    field = FlowField(torch.cat([torch.zeros_like(moved), moved]), torch.zeros(2, 1, 6, 7))
    save_flow(folder / "deflated.npz", field)
    arrays = {"displacement": field.displacement.numpy(), "occlusion": field.occlusion.numpy()}
    np.savez(folder / "stored.npz", **arrays)
    save_flow(folder / "one.flo", field)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip(chance: random.Random, content: bytes, end: int | None = None) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(end or len(changed))] = chance.choice(
            (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
        )
    return bytes(changed)


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: int(len(content) * chance.random() ** 3)]


def shift(chance: random.Random, content: bytes) -> bytes:
    """Insert or drop some bytes."""
    place = int(len(content) * chance.random() ** 3)
    if chance.random() < 0.5:
        return content[:place] + content[place + chance.randrange(1, 64) :]
    return content[:place] + chance.randbytes(chance.randrange(1, 64)) + content[place:]


def split(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: dict, weights: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights


def change_somewhere(chance: random.Random, values: dict | list) -> None:
    """Replace, drop or add one value of a nest of dictionaries and lists."""
    while True:
        places = list(values) if isinstance(values, dict) else list(range(len(values)))
        if not places:
            return
        place = chance.choice(places)
        inner = values[place]
        if not isinstance(inner, (dict, list)) or chance.random() < 0.2:
            break
        values = inner
    kind = chance.random()
    if kind < 0.1:
        del values[place]
    elif kind < 0.2 and isinstance(values, dict):
        values[chance.choice(("x", "", "width"))] = chance.choice(VALUES)
    elif kind < 0.3 and isinstance(values, list):
        values *= chance.choice((2, 1000))
    elif kind < 0.5 and type(values[place]) in (int, float):
        values[place] = values[place] * chance.choice((-1, 2, 3, 0.5, 1024, 2**40))
    else:
        values[place] = chance.choice(VALUES)


def change_config(chance: random.Random, content: bytes) -> bytes:
    header, weights = split(content)
    config = json.loads(header["__metadata__"]["s2dm"])
    for _ in range(chance.choice((1, 1, 2, 4))):
        change_somewhere(chance, config)
    text = json.dumps(config)
    if chance.random() < 0.3:  # as a tensor, as programs keep it that drop metadata
        header["__metadata__"] = {}
        end = len(weights)
        entry = {"dtype": "U8", "shape": [len(text)], "data_offsets": [end, end + len(text)]}
        header["s2dm.config"] = entry
        weights += text.encode()
    else:
        header["__metadata__"]["s2dm"] = text
    return joined(header, weights)


def change_table(chance: random.Random, content: bytes) -> bytes:
    header, weights = split(content)
    change_somewhere(chance, header)
    return joined(header, weights)


def flip_in_header(chance: random.Random, content: bytes) -> bytes:
    return flip(chance, content, 8 + int.from_bytes(content[:8], "little"))


def change_zip_field(chance: random.Random, content: bytes) -> bytes:
    """Another version, compression, encryption, size or name in one of the archive's headers."""
    magic = chance.choice((b"PK\3\4", b"PK\1\2", b"PK\5\6"))
    places = [at for at in range(len(content)) if content.startswith(magic, at)]
    if not places:
        return flip(chance, content)
    at = chance.choice(places) + 4 + 2 * chance.randrange(20)
    value = struct.pack("<H", chance.choice((0, 1, 8, 12, 14, 20, 63, 99, 255, 0xFFFF, 0x7FFF)))
    return content[:at] + value + content[at + 2 :]


def change_npy_header(chance: random.Random, content: bytes) -> bytes:
    """As long as before, so that a stored archive differs in its checksum alone."""
    pairs = (
        (b"<f4", b"|O8"), (b"<f4", b"<i4"), (b"<f4", b"<f9"), (b"(2, ", b"(-2,"),
        (b"(2, ", b"(9e9"), (b"(2, ", b"((((" ), (b"'shape'", b"'shave'"), (b"}", b"{"),
        (b"NUMPY\1", b"NUMPY\3"), (b"NUMPY\1", b"NUMPY\x09"), (b"7), }", b"7000}"),
        (b"False", b"'a'*9"), (b" 6, 7), }     ", b" 99999999999)}"),
    )  # fmt: skip
    before, after = chance.choice(pairs)
    return content.replace(before, after, chance.choice((1, 2)))


CHECKPOINT = (flip, cut, shift, flip_in_header, change_config, change_config, change_table)
FLOW = (flip, cut, shift, change_zip_field, change_zip_field, change_npy_header)


def numbers(count: int) -> Iterator[int]:
    end = time.monotonic() + SECONDS
    for number in range(count):
        if time.monotonic() > end:
            return
        yield number


def try_checkpoints(content: bytes, folder: Path, count: int) -> set[str]:
    """Mutate and load; the kinds of mutation of which at least one was refused."""
    path, refused = folder / "mutated.safetensors", set()
    for number in numbers(count):
        chance = random.Random(number)
        mutation = CHECKPOINT[number % len(CHECKPOINT)]
        path.write_bytes(mutation(chance, content))
        try:
            checkpoint = load_checkpoint(path)
            for part, network in (("flow_adapter", FlowAdapter), ("flow_generator", FlowGenerator)):
                if part in checkpoint:
                    config, state = checkpoint[part]
                    network(config).load_state_dict(state)
        except CheckpointError as error:
            assert str(error).startswith("mutated.safetensors: "), number
            refused.add(mutation.__name__)
        except Exception as error:
            raise AssertionError(f"{mutation.__name__} {number}: {error!r}") from error
    return refused


def try_flows(flows: dict[str, bytes], folder: Path, count: int) -> set[str]:
    refused = set()
    for number in numbers(count):
        chance = random.Random(number)
        mutation = FLOW[number % len(FLOW)]
        name = chance.choice(list(flows))
        path = folder / name
        path.write_bytes(mutation(chance, flows[name]))
        try:
            load_flow(path)
        except FlowError as error:
            assert str(path) in str(error), number
            refused.add(mutation.__name__)
        except Exception as error:
            raise AssertionError(f"{mutation.__name__} {number} of {name}: {error!r}") from error
    return refused


@pytest.mark.filterwarnings("ignore")  # of NumPy, about odd headers
@pytest.mark.parametrize("count", [105, pytest.param(2100, marks=pytest.mark.slow)])
def test_a_mutated_checkpoint_loads_or_is_refused_in_plain_words(tmp_path, checkpoint, count):
    kinds = try_checkpoints(checkpoint, tmp_path, count)
    assert kinds == {mutation.__name__ for mutation in CHECKPOINT}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [300, pytest.param(12_000, marks=pytest.mark.slow)])
def test_a_mutated_flow_file_loads_or_is_refused_in_plain_words(tmp_path, flows, count):
    assert try_flows(flows, tmp_path, count) == {mutation.__name__ for mutation in FLOW}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (6, 99, "version"),  # needed to extract, in the central directory
        (8, 1, "encrypted"),
        (10, 99, "compressed by method 99"),
        (10, 12, "compressed by method 12"),
    ],
)
def test_a_zip_header_that_asks_for_more(tmp_path, flows, field, value, message):
    content = bytearray(flows["deflated.npz"])
    at = content.index(b"PK\1\2") + field
    content[at : at + 2] = struct.pack("<H", value)
    path = tmp_path / "odd.npz"
    path.write_bytes(content)
    with pytest.raises(FlowError, match=message):
        load_flow(path)


def test_an_array_larger_than_its_file_is_refused_before_it_is_made(tmp_path, flows, monkeypatch):
    (tmp_path / "whole.npz").write_bytes(flows["stored.npz"])
    path = tmp_path / "large.npz"
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(path, "w") as large:
        for name in whole.namelist():
            content = whole.read(name).replace(b" 6, 7), }     ", b" 99999999, 7)}")
            large.writestr(name, content)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(FlowError, match=r"shape \(2, 2, 99999999, 7\) has \d+ bytes, which"):
        load_flow(path)
