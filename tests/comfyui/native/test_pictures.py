"""What other packs send through IMAGE and MASK sockets, and clips that no memory holds."""

from __future__ import annotations

import errno
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def tiny(rig, tmp_path_factory):
    """With stage 1."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return type(rig)(rig.pack, rig.nodes, write_random_checkpoint(path))


PATH = '[[{"x": 10, "y": 20}, {"x": 30, "y": 20}]]'
# What is connected instead of a picture, and what the error has to say of it.
NO_PICTURES: dict[str, tuple[Any, str]] = {
    "latent": ({"samples": torch.zeros(1, 4, 6, 8)}, "got dict"),
    "empty": (torch.zeros(0, 48, 64, 3), r"got \(0, 48, 64, 3\)"),
    "one dimension less": (torch.zeros(48, 64, 3), r"got \(48, 64, 3\)"),
    "two channels": (torch.zeros(1, 48, 64, 2), r"got \(1, 48, 64, 2\)"),
    "NaN": (torch.full((1, 48, 64, 3), torch.nan), "aren't finite"),
    "bytes": (torch.zeros(1, 48, 64, 3, dtype=torch.uint8), "got torch.uint8"),
}
NO_MASKS: dict[str, tuple[Any, str]] = {
    "latent": ({"samples": torch.zeros(1, 4, 6, 8)}, "got dict"),
    "empty": (torch.zeros(0, 48, 64), r"got \(0, 48, 64\)"),
    "one dimension": (torch.zeros(64), r"got \(64,\)"),
    "picture": (torch.zeros(1, 48, 64, 3), r"got \(1, 48, 64, 3\)"),
    "NaN": (torch.full((1, 48, 64), torch.nan), "aren't finite"),
}


def pan(rig: Any, **inputs: Any) -> Any:
    """A flow of three frames, 64 x 48."""
    size = {"frames": 3, "width": 64, "height": 48}
    return rig.run("S2DMCameraFlow", pan_x=4.0, **{**size, **inputs})[0]


IMAGES = {
    "S2DMDrawFlow.image": lambda rig, image: rig.run("S2DMDrawFlow", motion=PATH, image=image),
    "S2DMDrawFlow.depth": lambda rig, image: rig.run("S2DMDrawFlow", motion=PATH, depth=image),
    "S2DMCameraFlow.depth": lambda rig, image: pan(rig, depth=image),
    "S2DMCameraFlow.image": lambda rig, image: pan(rig, image=image),
    "S2DMEstimateFlow.frames": lambda rig, image: rig.run(
        "S2DMEstimateFlow", method="dis", frames=image
    ),
    "S2DMGenerateFlow.reference": lambda rig, image: rig.run(
        "S2DMGenerateFlow", flow_generator=rig.loaded.stage1, reference=image, prompt=""
    ),
    "S2DMAnchorToReference.reference": lambda rig, image: rig.run(
        "S2DMAnchorToReference",
        model=rig.loaded.model,
        vae=rig.loaded.vae,
        reference=image,
        flow=pan(rig),
    ),
    "S2DMWarpImage.image": lambda rig, image: rig.run("S2DMWarpImage", flow=pan(rig), image=image),
}
MASKS = {
    "S2DMTracksToFlow": lambda rig, mask: rig.run("S2DMTracksToFlow", coordinates=PATH, mask=mask),
    "S2DMEditFlow": lambda rig, mask: rig.run(
        "S2DMEditFlow", flow=pan(rig), operation="keep in mask", mask=mask
    ),
    "S2DMCombineFlow": lambda rig, mask: rig.run(
        "S2DMCombineFlow", first=pan(rig), second=pan(rig), how="first in the mask", mask=mask
    ),
    "S2DMWarpImage": lambda rig, mask: rig.run("S2DMWarpImage", flow=pan(rig), mask=mask),
    "S2DMEncodeFlow": lambda rig, mask: rig.encode(pan(rig), mask=mask),
}


@pytest.mark.parametrize("case", NO_PICTURES)
@pytest.mark.parametrize("socket", IMAGES)
def test_what_is_no_picture_is_refused(tiny, node_classes, socket, case):
    given, message = NO_PICTURES[case]
    node, name = socket.split(".")
    title = node_classes[node].GET_SCHEMA().display_name
    with pytest.raises(ValueError, match=f"{name}: expected an image .*({message})") as error:
        IMAGES[socket](tiny, given)
    assert str(error.value).startswith(f"{title}: ")


@pytest.mark.parametrize("case", NO_MASKS)
@pytest.mark.parametrize("node", MASKS)
def test_what_is_no_mask_is_refused(rig, node_classes, node, case):
    given, message = NO_MASKS[case]
    title = node_classes[node].GET_SCHEMA().display_name
    with pytest.raises(ValueError, match=f"mask: expected a mask .*({message})") as error:
        MASKS[node](rig, given)
    assert str(error.value).startswith(f"{title}: ")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pictures_in_grey_colour_and_with_alpha(rig, channels, dtype):
    image = torch.rand(2, 48, 64, channels).to(dtype)
    flow, _ = rig.run("S2DMDrawFlow", motion=PATH, frames=2, image=image, depth=image)
    images, *_ = rig.run("S2DMWarpImage", flow=flow, image=image, mask=image[..., 0])
    assert (flow.width, flow.height) == (64, 48) and images.shape == (2, 48, 64, 3)


def video() -> Any:
    from comfy_api.latest import InputImpl, Types

    images = torch.zeros(3, 8, 8, 3)
    return InputImpl.VideoFromComponents(
        Types.VideoComponents(images=images, audio=None, frame_rate=Fraction(8))
    )


LARGE = {
    "S2DMDrawFlow": lambda rig: rig.run(
        "S2DMDrawFlow", motion="", frames=16, image=torch.zeros(1, 256, 256, 3)
    ),
    "S2DMGenerateFlow": lambda rig: rig.run(
        "S2DMGenerateFlow",
        flow_generator=rig.loaded.stage1,
        reference=torch.zeros(1, 256, 256, 3),
        prompt="",
    ),
    "S2DMFitClip": lambda rig: rig.run("S2DMFitClip", video=video(), width=256, height=256),
    "S2DMWarpImage": lambda rig: rig.run(
        "S2DMWarpImage", flow=rig.equal_flow(3), image=torch.zeros(1, 256, 256, 3)
    ),
}


@pytest.mark.parametrize("node", LARGE)
def test_what_does_not_fit_into_memory_is_refused(tiny, node, monkeypatch):
    """Small ones stand for it here: the system ends a process that asks for too much."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1 << 20)
    with pytest.raises(ValueError, match=r"\(S2DM\): .*GiB of free memory, got .*256x256"):
        LARGE[node](tiny)


def test_a_name_without_letters_is_the_usual_one(rig):
    flow = pan(rig)
    paths = [
        Path(rig.run("S2DMSaveFlow", flow=flow, filename_prefix=name)[0])
        for name in ("", "  ", ".", "./")
    ]
    assert len(set(paths)) == 4 and {path.parent.name for path in paths} == {"flow"}
    assert all(path.name.startswith("s2dm_") for path in paths)


@pytest.mark.parametrize("layout", ["npz", "flo", "kitti"])
def test_a_full_disk_is_named_and_leaves_nothing(rig, monkeypatch, layout):
    """Wherever writing fails, whatever is written."""
    import os

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: Any, **__: Any) -> None:
        raise full

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    name = f"full_{layout}/clip"
    with pytest.raises(ValueError, match=r"^Save Flow \(S2DM\): .*No space left on device"):
        rig.run("S2DMSaveFlow", flow=pan(rig), filename_prefix=name, format=layout)
    import folder_paths

    folder = Path(folder_paths.get_output_directory()) / f"full_{layout}"
    assert not list(folder.iterdir())


def test_too_long_a_name_is_named(rig):
    with pytest.raises(ValueError, match=r"^Save Flow \(S2DM\): .*name too long.*at the name"):
        rig.run("S2DMSaveFlow", flow=pan(rig), filename_prefix="x" * 300)
