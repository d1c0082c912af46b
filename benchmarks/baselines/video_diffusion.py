"""VDM and LVDM: a 3D U-Net that denoises the latents of a whole clip, with a prompt or without.

Video Diffusion Models (arXiv 2204.03458) join the prompt to the embedding of time and let frames
meet in temporal attention; here they work on the latents of our autoencoder, and their U-Net is
that of our flow generator. Without an input for text it is unconditional latent video diffusion,
as LVDM (arXiv 2211.13221). Every frame has noise of its own, and nothing knows of flow.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from s2dm.files import replacing
from s2dm.models import ScheduleConfig
from s2dm.models.flow_generator import Head, UNet3D, per_frame
from s2dm.pipelines.modules import ddim_scheduler
from s2dm.sector import NoiseSharing, guide, sample
from s2dm.settings import from_dict
from s2dm.training.cache import weights_hash

_METADATA_KEY = "video_diffusion"


@dataclass(frozen=True)
class VideoDiffusionConfig:
    """The network: sizes under the names of `FlowGeneratorConfig`, and what it works on.

    text_dim 0 leaves the input for text out. The default sizes make 12.3 M parameters, as many
    as stage 2 has in U-Net and flow adapter together.
    """

    latent_channels: int = 4
    text_dim: int = 128
    model_channels: int = 72
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_heads: int = 4
    head_dim: int = 32
    norm_groups: int = 8
    norm: str = "frame"
    upsample: str = "nearest"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)


class VideoDiffusion(UNet3D):
    """Predicts the noise (or velocity) in the latents of a clip, all frames at once."""

    def __init__(self, config: VideoDiffusionConfig) -> None:
        super().__init__(config.latent_channels, config.text_dim, config)
        width = config.model_channels
        self.head = Head(2 * width, width, config.latent_channels, config)
        self.null_text = nn.Parameter(torch.zeros(1, config.text_dim)) if config.text_dim else None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | None = None,
        keep_text: Tensor | None = None,
    ) -> Tensor:
        """Predict what the network was trained on.

        Args:
            latents: noised (B, N, C, h, w), h and w multiples of 2 for each level but the first.
            timesteps: (B,), or one for all clips.
            text: one embedding for each prompt, (B, text_dim); None for the null label.
            keep_text: (B,) of true and false; false puts the null label in place of the text.

        Returns:
            (B, N, C, h, w).

        Raises:
            ValueError: text is given to a network that has no input for it.
        """
        embedding = self.embed_time(timesteps, len(latents))
        if self.null_text is not None:
            text = self.null_text if text is None else text
            if keep_text is not None:
                text = torch.where(keep_text[:, None], text, self.null_text)
            embedding = torch.cat([embedding, text.expand(len(latents), -1)], dim=1)
        elif text is not None:
            raise ValueError("text: expected None, got an embedding. This network reads no prompt.")
        return self.head(self.features(per_frame(self.first, latents), embedding))


@torch.no_grad()
def generate_latents(
    network: VideoDiffusion,
    text: Tensor | None,
    shape: tuple[int, int, int, int],
    steps: int = 20,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one clip with the DDIM that stage 2 has.

    Args:
        network: on the device and in the type to sample in.
        text: (1, text_dim); None for the null label, or for a network without text.
        shape: (N, C, h, w) of the latents.
        steps: number of sampling steps.
        guidance_scale: how far to go from the null text to the text; 1 for no guidance.
        generator: seeded CPU generator of the noise.

    Returns:
        (N, C, h, w) float32 latents.
    """
    weights = next(network.parameters())
    text = None if text is None else text.to(weights)

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        clip = latents[None].to(weights)
        known = network(clip, timestep, text)[0].float()
        if text is None or guidance_scale == 1:
            return known
        return guide(network(clip, timestep)[0].float(), known, guidance_scale)

    noise = NoiseSharing("independent").draw(shape[0], shape[1:], generator).to(weights.device)
    return sample(denoise, ddim_scheduler(network.config.schedule), noise, steps)


# -------------------------------------------------------------------------------------- files


def input_hash(vae: Any, text_encoder: nn.Module | None) -> str:
    """A hash of the weights that make what a network reads: latents and, if any, text."""
    parts = [vae.encoder, vae.quant_conv]
    return weights_hash(nn.ModuleList(parts if text_encoder is None else [*parts, text_encoder]))


def save_network(path: Path, network: VideoDiffusion, trained_on: str) -> None:
    """Write a network in half precision, whole or not at all.

    trained_on: the `input_hash` of its training.
    """
    state = {key: value.half().cpu().contiguous() for key, value in network.state_dict().items()}
    description = {"config": dataclasses.asdict(network.config), "trained_on": trained_on}
    with replacing(path) as temporary:
        save_file(state, temporary, {"format": "pt", _METADATA_KEY: json.dumps(description)})


def load_network(path: Path) -> tuple[VideoDiffusion, str]:
    """Read a network, float32, and the `input_hash` of its training.

    Raises:
        ValueError: the file is another one.
        OSError: it can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: expected a safetensors file, got {error}.") from error
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path.name}: expected the export of benchmarks/baselines/train.py, got another file."
        )
    description = json.loads(metadata[_METADATA_KEY])
    network = VideoDiffusion(from_dict(VideoDiffusionConfig, description["config"]))
    network.load_state_dict(state)
    return network.eval(), description["trained_on"]
