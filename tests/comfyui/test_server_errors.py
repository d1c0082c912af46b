"""A wrong file gives its own clear error in a running server, which then runs the next prompt."""

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_server import ComfyServer, PromptError
from random_checkpoint import write_random_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.comfyui


def edited(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Rewrite a checkpoint after `change` has had its tensors and its S2DM metadata."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = dict(file.metadata())
    config = json.loads(metadata["s2dm"])
    change(tensors, config)
    save_file(tensors, path, {**metadata, "s2dm": json.dumps(config)})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_safetensors(path: Path) -> None:
    path.write_bytes(b"<html>Not Found</html>" * 100)


def renamed_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


def renamed_torch_file(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def plain_stable_diffusion(path: Path) -> None:
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, path)


def first_key(tensors: dict, config: dict) -> None:
    tensors.pop(next(iter(tensors)))


def wrong_keys(path: Path) -> None:
    edited(path, first_key)


def wrong_shapes(path: Path) -> None:
    def change(tensors: dict, config: dict) -> None:
        name = "model.diffusion_model.out.2.bias"
        tensors[name] = torch.zeros(len(tensors[name]) + 1)

    edited(path, change)


def not_finite(path: Path) -> None:
    edited(path, lambda tensors, _: tensors["model.diffusion_model.out.2.bias"].fill_(torch.nan))


def future_version(path: Path) -> None:
    edited(path, lambda _, config: config.update(format_version=99))


def header_too_long(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


# What each file is, and what its error has to say.
WRONG_FILES = {
    truncated: "truncated|incomplete|shorter|cut|end",
    not_safetensors: "not a safetensors|safetensors",
    renamed_pickle: "pickle.*convert|convert.*pickle",
    renamed_torch_file: "convert",
    plain_stable_diffusion: "metadata|S2DM",
    wrong_keys: "missing",
    wrong_shapes: "shape",
    not_finite: "NaN|finite",
    future_version: "99",
    header_too_long: "safetensors|header",
}


def load(name: str) -> dict:
    return {
        "1": {
            "class_type": "S2DMCheckpointLoader",
            "inputs": {"checkpoint": name, "frames_at_once": 0},
        },
        "2": {
            "class_type": "EmptyImage",
            "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0},
        },
        "3": {
            "class_type": "VAEEncode",
            "inputs": {"pixels": ["2", 0], "vae": ["1", 2]},
        },
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }


@pytest.mark.parametrize(
    ("damage", "message"), WRONG_FILES.items(), ids=[case.__name__ for case in WRONG_FILES]
)
def test_a_wrong_checkpoint_is_named_and_the_server_lives(
    server: ComfyServer, damage: Callable[[Path], None], message: str
) -> None:
    folder = server.base / "models" / "s2dm"
    path = folder / f"{damage.__name__}.safetensors"
    write_random_checkpoint(path)
    damage(path)
    with pytest.raises(PromptError) as caught:
        server.run(load(path.name))
    said = str(caught.value)
    assert caught.value.node_type == "S2DMCheckpointLoader"
    assert path.name in said and "Load Checkpoint (S2DM)" in said
    assert re.search(message, said, re.I | re.S), said
    path.unlink()
    # Another size each time, so that the server cannot answer from its cache.
    healthy = load("random.safetensors")
    healthy["2"]["inputs"]["width"] = 16 + 8 * list(WRONG_FILES).index(damage)
    assert server.files(server.run(healthy))


def test_a_checkpoint_that_is_gone_is_named_beside_those_that_are_there(
    server: ComfyServer,
) -> None:
    """Some versions of ComfyUI refuse such a prompt themselves, others leave it to the node."""
    with pytest.raises(PromptError, match=r"never_there\.safetensors") as caught:
        server.run(load("never_there.safetensors"))
    assert "random.safetensors" in str(caught.value)
