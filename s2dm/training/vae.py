"""Train the autoencoder (the VAE of Stable Diffusion 1.x, at any size) on the frames of a data
set.

Most of it is convolutions, which do not care where a patch comes from, so most steps train on
crops around what moves; the others train on whole frames, for the attention in the middle.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import DataConfig, held_out_clips
from ..models import VAEConfig
from ..pipelines.modules import build_vae, reconstruct
from ..settings import SettingsError
from ..video import write_contact_sheet
from .adversarial import LEAST_PIXELS, AdversarialLoss
from .cache import ClipCache, training_clips
from .config import TrainingConfig
from .loop import Progress, run_training
from .models import load_model, preset, save_vae

_SCALES = 4
_QUIET = 6.0
"""How much lower than 0 the log-variance of an untrained encoder's latents starts."""


@dataclass(frozen=True, kw_only=True)
class VAETrainingConfig(TrainingConfig):
    """Settings of the VAE trainer.

    `preset` names the architecture (`s2dm.models.presets`); `checkpoint` is a file to start
    from instead of random weights. `batch_size` counts crops of `crop` pixels; in a share
    `whole_frames` of the steps it counts as many pixels in whole frames. A share
    `motion_share` of the crops is centred where something moves. For the first `guide_steps`
    steps from random weights the latents are drawn towards a thumbnail of the picture.
    `freeze_encoder` trains the decoder of `checkpoint` alone, for latents that stay as they
    are: a stage 2 that was trained on them remains valid. `normalise` gives the latents of the
    export mean 0 and deviation 1 in every channel, for a U-Net that is new; without it a
    fine-tuned `checkpoint` keeps its scale, so that its U-Net still knows them, as the paper does
    with Stable Diffusion's. `adversarial_weight` above 0 adds an adversarial loss
    (`s2dm.training.adversarial`); for the first `adversarial_warmup` steps its discriminator
    learns alone.
    """

    output: str = "runs/vae"
    preset: str = "puppets"
    checkpoint: str = ""
    batch_size: int = 24
    crop: int = 64
    whole_frames: float = 0.15
    motion_share: float = 0.8
    kl_weight: float = 1e-3
    edge_weight: float = 1.0
    colour_weight: float = 1.0
    guide_steps: int = 500
    freeze_encoder: bool = False
    normalise: bool = True
    adversarial_weight: float = 0.0
    adversarial_warmup: int = 500
    validation_clips: int = 12


class PyramidLoss(nn.Module):
    """Error of the pixels, their colours and their gradients at several scales.

    The mean alone lets outlines blur, which the gradients prevent. Brightness carries most of
    the error and is learned first; the coarse scales and the error of the colour alone keep
    the colours of clothes from coming much later.
    """

    def __init__(self, edge_weight: float = 1.0, colour_weight: float = 1.0) -> None:
        super().__init__()
        self.edge_weight = edge_weight
        self.colour_weight = colour_weight

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """(N,3,H,W) in [-1,1] each; a scalar in the units of the pictures."""
        error = output.float() - target.float()
        loss = error.new_zeros(())
        # Differences and pooling are linear: the gradient of the error is the error of it.
        for scale in range(_SCALES):
            if scale:
                error = F.avg_pool2d(error, 2)
            colour = error - error.mean(1, keepdim=True)
            edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
            loss = loss + error.abs().mean() + 2 * error.square().mean()
            loss = loss + self.colour_weight * colour.abs().mean()
            loss = loss + self.edge_weight * edges / _SCALES
        return loss


class VAEModel(nn.Module):
    """The autoencoder with its loss, as the loop wants it."""

    def __init__(self, vae: nn.Module, config: VAETrainingConfig) -> None:
        super().__init__()
        self.vae = vae
        self.reconstruction = PyramidLoss(config.edge_weight, config.colour_weight)
        self.kl_weight = config.kl_weight
        self.adversarial = None
        if config.adversarial_weight > 0:
            self.adversarial = AdversarialLoss(config.adversarial_weight, config.adversarial_warmup)
        self.guide_steps = 0 if config.checkpoint else config.guide_steps
        self.register_buffer("steps", torch.zeros(()))
        self.share_of_a_step = 1 / config.gradient_accumulation

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`pixels` (N,3,H,W) in [0,1] and `noise` (N,C,H/8,W/8) for the posterior."""
        pixels = batch["pixels"] * 2 - 1
        posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * batch["noise"]
        output = self.vae.decode(latents).sample
        reconstruction = self.reconstruction(output, pixels)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + self.kl_weight * kl + self._guide(mean, pixels)
        figures = {"loss_reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if self.adversarial is not None:
            last = self.vae.decoder.conv_out.weight
            losses = self.adversarial(output, pixels, reconstruction, last, self.steps)
            loss = loss + sum(losses.values())
            figures |= {f"loss_{name}": value.detach() for name, value in losses.items()}
        if self.training:
            self.steps += self.share_of_a_step
        return {"loss": loss, **figures}

    def _guide(self, mean: Tensor, pixels: Tensor) -> Tensor:
        """Draw the first three latents towards a thumbnail of the picture, at first.

        It hands the decoder the colours from the start; found from noise they take thousands
        of steps. The pull fades to nothing over `guide_steps`.
        """
        if not self.guide_steps:
            return mean.new_zeros(())
        # Not read back from the device, which would wait for all that it has still to do.
        weight = (1 - self.steps / self.guide_steps).clamp(min=0)
        thumbnail = 2 * F.adaptive_avg_pool2d(pixels, mean.shape[-2:])
        return weight * F.mse_loss(mean[:, :3], thumbnail)


class VAETask:
    """What the loop needs to train a VAE."""

    def __init__(
        self,
        config: VAETrainingConfig,
        vae_config: VAEConfig,
        vae: nn.Module,
        clips: ClipCache,
        validation: Tensor,
    ) -> None:
        self.config = config
        self.vae_config = vae_config
        self.model = VAEModel(vae, config).to(memory_format=torch.channels_last)
        self.clips = clips
        self.validation = validation
        self._moving: dict[int, Tensor] = {}
        if config.freeze_encoder:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)

    def compile(self) -> None:
        self.model.vae.encoder.compile(dynamic=False)
        self.model.vae.decoder.compile(dynamic=False)

    def batch(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        config = self.config
        height, width = self.clips.frames.shape[-2:]
        crop = (min(config.crop, height), min(config.crop, width))
        count = config.batch_size
        if torch.rand((), generator=generator) < config.whole_frames:
            count = max(1, round(count * crop[0] * crop[1] / (height * width)))
            crop = (height, width)
        pictures = torch.stack([self._crop(crop, generator) for _ in range(count)])
        factor = self.vae_config.factor
        shape = (count, self.vae_config.latent_channels, crop[0] // factor, crop[1] // factor)
        noise = torch.randn(shape, generator=generator)
        pictures = pictures.to(device).contiguous(memory_format=torch.channels_last)
        return {"pixels": pictures, "noise": noise.to(device)}

    def _crop(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        clip = int(torch.randint(len(self.clips), (), generator=generator))
        frame = int(torch.randint(self.clips.frames.shape[1], (), generator=generator))
        height, width = self.clips.frames.shape[-2:]
        tall, wide = height - size[0], width - size[1]
        top = int(torch.randint(tall + 1, (), generator=generator))
        left = int(torch.randint(wide + 1, (), generator=generator))
        if tall or wide:
            jitter = torch.randint(-size[0] // 4, size[0] // 4 + 1, (2,), generator=generator)
            if torch.rand((), generator=generator) < self.config.motion_share:
                centre = self._moving_pixel(clip, generator)
                top = min(max(int(centre[0] + jitter[0]) - size[0] // 2, 0), tall)
                left = min(max(int(centre[1] + jitter[1]) - size[1] // 2, 0), wide)
        window = (frame, ..., slice(top, top + size[0]), slice(left, left + size[1]))
        return self.clips.pixels(clip, window)

    def _moving_pixel(self, clip: int, generator: torch.Generator) -> tuple[int, int]:
        """A pixel (row, column) drawn from where the clip's flow is largest over time."""
        height, width = self.clips.frames.shape[-2:]
        if clip not in self._moving:
            motion = torch.from_numpy(self.clips.conditions[clip].copy())[:, :2].float()
            motion = motion.square().sum(1).amax(0)
            self._moving[clip] = motion > 0.01 * motion.amax()
        moving = self._moving[clip]
        if not moving.any():
            return height // 2, width // 2
        cell = int(torch.multinomial(moving.flatten().float(), 1, generator=generator))
        row, column = divmod(cell, moving.shape[1])
        return row * height // moving.shape[0], column * width // moving.shape[1]

    def sample(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Held-out frames above their reconstructions; PSNR in dB over all of them."""
        outputs = reconstruct(model.vae, self.validation)
        error = (outputs - self.validation).square().mean((1, 2, 3))
        half = min(8, len(outputs))
        rows = []
        for start in range(0, min(len(outputs), 3 * half), half):
            part = slice(start, start + half)
            rows += [self.validation[part], outputs[part]]
        write_contact_sheet(path, rows)
        return {
            "psnr": float(-10 * error.clamp_min(1e-10).log10().mean()),
            "psnr_worst": float(-10 * error.clamp_min(1e-10).log10().amax()),
        }

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the VAE, with latents normalised if asked for, and their scale in its config."""
        state = {k: v.detach().clone() for k, v in model.vae.state_dict().items()}
        config = self.vae_config
        if self.config.normalise and not self.config.freeze_encoder:
            mean, std = self.latent_statistics(model.vae)
            normalise_latents(state, mean, std)
            config = dataclasses.replace(config, scaling_factor=1.0)
        save_vae(path, config, state)

    def latent_statistics(self, vae: nn.Module, clips: int = 64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel over the training data, (C,) each."""
        device = next(vae.parameters()).device
        step = max(1, len(self.clips) // clips)
        frames = range(0, self.clips.frames.shape[1], 5)
        pictures = torch.cat(
            [self.clips.pixels(i, list(frames)) for i in range(0, len(self.clips), step)]
        )
        latents = torch.cat(
            [vae.encode(part.to(device) * 2 - 1).latent_dist.mode() for part in pictures.split(16)]
        ).float()
        return latents.mean((0, 2, 3)).cpu(), latents.std((0, 2, 3)).cpu()


def normalise_latents(state: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Fold the normalisation (z - mean) / std into the 1×1 convolutions around the latents.

    The autoencoder stays the same function of a picture, and its latents get mean 0 and
    standard deviation 1 in every channel, so that the one scaling factor of Stable Diffusion
    (here 1) fits all of them. `state` is in diffusers' keys and is changed in place.
    """
    channels = len(mean)
    for key in ("quant_conv.weight", "quant_conv.bias"):
        value = state[key].float()
        if key.endswith("bias"):
            value[:channels] -= mean.to(value)
        shape = (-1,) + (1,) * (value.ndim - 1)
        value[:channels] /= std.to(value).reshape(shape)
        if key.endswith("bias"):
            value[channels:] -= 2 * std.to(value).log()
        state[key] = value
    weight = state["post_quant_conv.weight"].float()
    shift = weight[:, :, 0, 0] @ mean.to(weight)
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"].float() + shift
    state["post_quant_conv.weight"] = weight * std.to(weight).reshape(1, -1, 1, 1)


def build_vae_task(config: VAETrainingConfig) -> VAETask:
    """Prepare data and model for `config`."""
    data = training_clips(config)
    held_out = held_out_frames(config.data, config.validation_clips)
    torch.manual_seed(config.seed)  # whatever preparing the data has drawn
    if config.freeze_encoder and not config.checkpoint:
        raise SettingsError("freeze_encoder needs a checkpoint whose encoder stays as it is.")
    if not (config.normalise or config.checkpoint):
        raise SettingsError(
            "normalise=false needs a checkpoint whose latents keep their scale: those of random "
            "weights have none that a U-Net knows."
        )
    if config.checkpoint:
        vae_config, state = load_model(config.checkpoint, ["vae"])["vae"]
        vae = build_vae(vae_config, state)
    else:
        vae_config = preset(config.preset).vae
        vae = build_vae(vae_config)
        _quiet_posterior(vae, vae_config.latent_channels)
    for name, side in (("crop", config.crop), ("data.size", config.data.size)):
        if side % vae_config.factor:
            raise SettingsError(
                f"{name} must be a multiple of the VAE's factor {vae_config.factor}, got {side}."
            )
    if config.adversarial_weight > 0 and config.crop < LEAST_PIXELS:
        raise SettingsError(
            f"crop must be at least {LEAST_PIXELS} with an adversarial loss, got {config.crop}."
        )
    return VAETask(config, vae_config, vae, data, held_out)


@torch.no_grad()
def _quiet_posterior(vae: nn.Module, channels: int) -> None:
    """Let an untrained encoder's latents start nearly free of posterior noise.

    With the usual start the noise is louder than the latents, and the decoder learns to do
    without them.
    """
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] -= _QUIET


def held_out_frames(config: DataConfig, clips: int) -> Tensor:
    """First and middle frame of `clips` held-out clips, (2n,3,H,W)."""
    frames = []
    for clip in held_out_clips(config, clips):
        picture = clip.pixels
        frames += [picture[0], picture[len(picture) // 2]]
    return torch.stack(frames)


def train_vae(config: VAETrainingConfig) -> Progress:
    """Train a VAE as `config` says, or go on with the run in its folder.

    The folder's `export.safetensors` holds the averaged weights whenever a sheet was written.
    """
    return run_training(config, lambda device: build_vae_task(config))
