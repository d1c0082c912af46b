"""The trainer of the region-motion model: its losses, and what a run writes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from lfdm_files import REGIONS
from tiny_training import DATA

from s2dm.cli import main
from s2dm.flow import estimate_flow
from s2dm.models import load_checkpoint
from s2dm.models.region_motion import Regions, axes, grid
from s2dm.pipelines.modules import build
from s2dm.settings import SettingsError, from_dict
from s2dm.training import perceptual, region_motion
from s2dm.training.deformation import Deformation
from s2dm.training.loop import step_generator
from s2dm.training.perceptual import PerceptualLoss
from s2dm.training.region_motion import (
    RegionMotionTrainingConfig,
    build_region_motion_task,
    equivariance,
    train_region_motion,
)
from s2dm.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    monkeypatch.setitem(region_motion.REGION_MOTION, "puppets", REGIONS)


def config(folder, **settings) -> RegionMotionTrainingConfig:
    values = {
        "output": str(folder),
        "data": DATA,
        "steps": 3,
        "pairs": 3,
        "workers": 0,
        "warmup_steps": 1,
        "log_every": 1,
        "validation_clips": 2,
        "sample_frames": 2,
        "equivariance": 0.3,
    }
    return from_dict(RegionMotionTrainingConfig, values | settings)


def deformation(count: int = 2, affine: float = 0.05, bend: float = 0.02) -> Deformation:
    return Deformation.draw(count, affine, bend, torch.Generator().manual_seed(0))


def test_slopes_are_the_derivatives_of_positions():
    known = deformation()
    places = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    jacobian = torch.autograd.functional.jacobian(lambda z: known.at(z).sum(dim=(0, 1)), places)
    expected = jacobian.permute(1, 2, 0, 3)
    torch.testing.assert_close(known.slopes(places), expected, rtol=0, atol=1e-4)
    flat = deformation(affine=0.0, bend=0.0)
    torch.testing.assert_close(flat.at(places), places)


def test_a_deformed_picture_shows_what_was_there():
    """A linear picture shows the position that each of its pixels came from."""
    known = deformation(bend=0.005)
    height, width = 40, 48
    # Sampling counts -1 and 1 as edges.
    edges = torch.tensor([(width - 1) / width, (height - 1) / height]).view(2, 1, 1)
    cells = grid((height, width), edges)
    seen = known.apply((cells * edges).expand(2, -1, -1, -1))
    came = known.at(cells.flatten(1).T.expand(2, -1, -1)).mT.unflatten(2, (height, width))
    inside = (slice(None), slice(None), slice(5, -5), slice(5, -5))
    torch.testing.assert_close(seen[inside], came[inside], rtol=0, atol=1e-3)


def test_regions_that_move_with_the_picture_cost_nothing():
    known = deformation()
    generator = torch.Generator().manual_seed(2)
    centre = torch.rand(2, 4, 2, generator=generator) - 0.5
    square = torch.randn(2, 4, 2, 2, generator=generator)
    deformed = Regions(centre, square @ square.mT, axes(square @ square.mT))
    moved = known.slopes(centre) @ deformed.affine
    right = Regions(known.at(centre), moved @ moved.mT, moved)
    place, shape = equivariance(right, deformed, known)
    assert place < 1e-5 and shape < 1e-3
    flipped = right._replace(affine=-right.affine)  # axes have no sign
    assert equivariance(flipped, deformed, known)[1] < 1e-3
    wrong = right._replace(centre=right.centre + 0.1)
    assert equivariance(wrong, deformed, known)[0] == pytest.approx(0.1, abs=1e-4)


def test_a_batch_is_pairs_of_one_clip_and_its_loss_reaches_every_part(tmp_path):
    task = build_region_motion_task(config(tmp_path))
    batch = task.batch(step_generator(0, 0), torch.device("cpu"))
    assert batch["first"].shape == batch["frame"].shape == (3, 3, 32, 32)
    same = [(a - b).abs().max() < 1 for a, b in zip(batch["first"], batch["frame"], strict=True)]
    assert all(same)
    losses = task.model(batch)
    assert {"loss", "loss_reconstruction", "loss_place", "loss_shape"} == set(losses)
    losses["loss"].backward()
    for name, weight in task.model.network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        if name != "background.affine.weight" and not name.endswith("conv.bias"):
            # Normalisation takes out what a bias before it adds; the affine map starts constant,
            # and what comes before it learns from the second step on.
            assert weight.grad.abs().max() > 0 or name.startswith("background.down"), name


def test_a_run_is_resumed_and_writes_a_model_that_measures(tmp_path):
    folder = tmp_path / "run"
    train_region_motion(config(folder, steps=2))
    train_region_motion(config(folder, steps=4))
    records = RunFolder(folder).records()
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert any("flow_error" in record for record in records)
    checkpoint = load_checkpoint(folder / "export.safetensors")
    assert list(checkpoint) == ["region_motion"]
    assert checkpoint.config.region_motion == REGIONS
    network = build(checkpoint, "region_motion").eval()
    field = estimate_flow(torch.rand(3, 3, 20, 24), network)
    assert field.displacement.shape == (3, 2, 20, 24)
    again = build_region_motion_task(
        config(tmp_path / "next", checkpoint=str(folder / "export.safetensors"))
    )
    state = again.model.network.state_dict()
    assert all(torch.equal(state[n], w) for n, w in network.state_dict().items())


def test_what_does_not_fit_is_said(tmp_path, capsys):
    with pytest.raises(SettingsError, match="preset"):
        config(tmp_path, preset="other")
    with pytest.raises(SettingsError, match="multiples of 32"):
        build_region_motion_task(config(tmp_path, data={**DATA, "size": 40}))
    assert main(["train", "region-motion", "--set", "mixed_precision=fp16"]) != 0
    assert "bf16" in capsys.readouterr().err


def test_the_perceptual_loss_takes_torchvisions_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "_WIDTHS", ((4, 4), (4, 4), (4,) * 4, (4,) * 4, (4,)))
    torch.manual_seed(0)
    names = perceptual._layers().state_dict()
    # As in torchvision's file, which goes on behind the layers that count.
    published = {f"features.{name}": torch.randn_like(w) for name, w in names.items()}
    torch.save(published | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg19.pth")
    loss = PerceptualLoss(tmp_path / "vgg19.pth")
    picture = torch.rand(1, 3, 128, 128, requires_grad=True)
    assert loss(picture, picture) == 0
    other = loss(picture, torch.zeros(1, 3, 128, 128))
    other.backward()
    assert other > 0 and picture.grad.abs().max() > 0
    assert not any(weight.requires_grad for weight in loss.parameters())
    del published["features.28.weight"]
    torch.save(published, tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="VGG-19"):
        PerceptualLoss(tmp_path / "other.pth")


def test_the_layers_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        theirs = models.vgg19(weights=None).features
        ours = perceptual._layers()
    for number, layer in enumerate(ours):
        assert type(layer) is type(theirs[number])
    shapes = {name: weight.shape for name, weight in theirs.state_dict().items()}
    assert all(shapes[name] == weight.shape for name, weight in ours.state_dict().items())
    assert all(isinstance(ours[number], torch.nn.ReLU) for number in perceptual._LAYERS)
