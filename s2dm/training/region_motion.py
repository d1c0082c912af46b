"""Train the region-motion model on the frames of a data set, without any flow (arXiv 2104.11280).

Two frames of a clip: the first one, moved by the flow that the model finds and mended by its
decoder, must become the other. And regions found in a deformed frame must be the deformed regions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Clip, held_out_clips
from ..flow import FlowField, estimate_flow, flow_to_image
from ..models import RegionMotion, RegionMotionConfig, S2DMConfig
from ..models.checkpoint import Checkpoint, save_checkpoint
from ..models.presets import REGION_MOTION
from ..models.region_motion import Regions
from ..pipelines.modules import build_region_motion
from ..settings import SettingsError
from ..video import write_contact_sheet
from ..video.frames import spread
from .cache import ClipCache, training_clips
from .config import TrainingConfig
from .deformation import Deformation
from .loop import Progress, run_training
from .models import load_model
from .perceptual import PerceptualLoss
from .vae import PyramidLoss


@dataclass(frozen=True, kw_only=True)
class RegionMotionTrainingConfig(TrainingConfig):
    """Settings of the region-motion trainer; the defaults that others share too are LFDM's.

    A batch is `pairs` pairs of frames, each pair from one clip; a share of `flip` of them is
    mirrored. `preset` is "puppets" or "lfdm", the published sizes, for frames of `data.size`;
    `checkpoint` is a file to go on from. `vgg` is torchvision's file of VGG-19, for the perceptual
    loss of the paper; without it the loss is that of pixels, colours and gradients at several
    sizes, which the autoencoder is trained with. That is some hundred times smaller, and so should
    `equivariance` be, the weight of the other loss, on frames deformed by `affine` and `bend`
    (standard deviations, in units of half a frame).
    """

    output: str = "runs/region_motion"
    preset: str = "puppets"
    checkpoint: str = ""
    pairs: int = 16
    flip: float = 0.5
    vgg: str = ""
    equivariance: float = 10.0
    affine: float = 0.05
    bend: float = 0.005
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0.0
    mixed_precision: str = "no"
    validation_clips: int = 4
    sample_frames: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in REGION_MOTION:
            raise SettingsError(
                f"unknown preset {self.preset!r}; known: {', '.join(REGION_MOTION)}."
            )
        if self.mixed_precision == "fp16":
            raise SettingsError("the region-motion model trains in bf16 or in full precision.")


class RegionMotionModel(nn.Module):
    """The model with its losses, as the loop wants it."""

    def __init__(self, network: RegionMotion, config: RegionMotionTrainingConfig) -> None:
        super().__init__()
        self.network = network
        self.equivariance = config.equivariance
        self.loss = PerceptualLoss(Path(config.vgg)) if config.vgg else PyramidLoss()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`first` and `frame` (B, 3, H, W) in [0, 1]; `affine` and `bend` of a `Deformation`."""
        network, first, frame = self.network, batch["first"], batch["frame"]
        deformation = Deformation(batch["affine"], batch["bend"])
        found = network.regions(torch.cat([first, frame, deformation.apply(frame)]))
        before, after, deformed = (
            found.part(slice(start, start + len(first)))
            for start in range(0, 3 * len(first), len(first))
        )
        made = network.reconstruct(first, network.motion(first, frame, before, after))
        reconstruction = self._difference(made, frame)
        place, shape = equivariance(after, deformed, deformation)
        loss = reconstruction + self.equivariance * (place + shape)
        figures = {
            "loss_reconstruction": reconstruction.detach(),
            "loss_place": place.detach(),
            "loss_shape": shape.detach(),
        }
        return {"loss": loss, **figures}

    def _difference(self, made: Tensor, frame: Tensor) -> Tensor:
        if isinstance(self.loss, PyramidLoss):  # made for pictures in [-1, 1]
            return self.loss(made * 2 - 1, frame * 2 - 1)
        return self.loss(made, frame)


def equivariance(
    regions: Regions, deformed: Regions, deformation: Deformation
) -> tuple[Tensor, Tensor]:
    """How far regions of a deformed frame are from the deformed regions of the frame: in place
    and in shape, each a mean of absolute differences."""
    place = (regions.centre - deformation.at(deformed.centre)).abs().mean()
    turned = deformation.slopes(deformed.centre) @ deformed.affine
    same = torch.linalg.inv(regions.affine) @ turned
    # The axes of a region are known up to their sign.
    same = same * same[..., :1, :1].sign()
    return place, (torch.eye(2).to(same) - same).abs().mean()


class RegionMotionTask:
    """What the loop needs to train a region-motion model."""

    def __init__(
        self,
        config: RegionMotionTrainingConfig,
        network: RegionMotion,
        clips: ClipCache,
        validation: list[Clip],
    ) -> None:
        self.config = config
        self.clips = clips
        self.validation = validation
        self.model = RegionMotionModel(network, config)

    def compile(self) -> None:
        self.model.network.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        config = self.config
        count, frames = config.pairs, self.clips.frames.shape[1]
        pairs = []
        for _ in range(count):
            clip = int(torch.randint(len(self.clips), (), generator=generator))
            chosen = torch.randperm(frames, generator=generator)[:2].tolist()
            pairs.append(self.clips.pixels(clip, chosen))
        pictures = torch.stack(pairs)
        mirrored = torch.rand(count, generator=generator) < config.flip
        pictures[mirrored] = pictures[mirrored].flip(-1)
        deformation = Deformation.draw(count, config.affine, config.bend, generator)
        values = {
            "first": pictures[:, 0],
            "frame": pictures[:, 1],
            "affine": deformation.affine,
            "bend": deformation.bend,
        }
        return {name: value.to(device).contiguous() for name, value in values.items()}

    def sample(self, model: RegionMotionModel, path: Path) -> dict[str, float]:
        """For each held-out clip its frames, the model's reconstructions, true and found flow.

        The figure is the error of the flow over the motion, where something moves.
        """
        rows, errors = [], []
        network = model.network
        device = next(network.parameters()).device
        for clip in self.validation:
            found = estimate_flow(clip.pixels, network)
            errors.append(_error(found, clip.flow))
            keep = spread(len(found), self.config.sample_frames)
            frames = clip.pixels[keep]
            first = frames[:1].to(device).expand_as(frames)
            made = network.reconstruct(first, network(first, frames.to(device))).cpu()
            scale = max(clip.flow.magnitude().max().item(), 1.0)
            flows = [flow_to_image(FlowField.select(f, keep), scale) for f in (clip.flow, found)]
            rows += [frames, made, *flows]
        write_contact_sheet(path, rows)
        wrong, motion = torch.tensor(errors).sum(dim=0).tolist()
        return {"flow_error": wrong / motion if motion else math.nan}

    def export(self, model: RegionMotionModel, path: Path) -> None:
        """Write a checkpoint that holds the model alone."""
        network = model.network
        config = S2DMConfig(
            region_motion=network.config,
            resolution=network.config.size,
            data=f"frames of {self.config.data.name}",
        )
        save_checkpoint(path, Checkpoint(config, {"region_motion": network.state_dict()}))


def _error(found: FlowField, true: FlowField) -> tuple[float, float]:
    """Length of the difference and of the true motion, summed over what frame 1 shows and what
    moves by more than a pixel."""
    length = true.magnitude()
    moving = (length > 1) & (true.occlusion < 0.5)
    difference = FlowField(found.displacement - true.displacement, true.occlusion).magnitude()
    return float(difference[moving].sum()), float(length[moving].sum())


def build_region_motion_task(config: RegionMotionTrainingConfig) -> RegionMotionTask:
    """Prepare data and model for `config`."""
    clips = training_clips(config)
    validation = held_out_clips(config.data, config.validation_clips)
    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    if config.checkpoint:
        sizes, state = load_model(config.checkpoint, ["region_motion"])["region_motion"]
        network = build_region_motion(sizes, state)
    else:
        side = config.data.size
        sizes = dataclasses.replace(REGION_MOTION[config.preset], size=(side, side))
        network = build_region_motion(sizes)
    _check(config, sizes, clips)
    return RegionMotionTask(config, network, clips, validation)


def _check(config: RegionMotionTrainingConfig, sizes: RegionMotionConfig, clips: ClipCache) -> None:
    size = tuple(clips.frames.shape[-2:])
    if size != sizes.size:
        raise SettingsError(
            f"data.size: expected frames of {sizes.size[0]}x{sizes.size[1]}, as the model reads "
            f"them, got {size[0]}x{size[1]}."
        )
    if clips.frames.shape[1] < 2:
        raise SettingsError("data.frames: expected at least 2, a pair, got 1.")


def train_region_motion(config: RegionMotionTrainingConfig) -> Progress:
    """Train a region-motion model as `config` says, or go on with the run in its folder.

    The folder's `export.safetensors` holds the averaged weights whenever a sheet was written.
    """
    return run_training(config, lambda device: build_region_motion_task(config))
