"""`s2dm train adapter`: the trainer of `flow_adapter` on the denoiser of a checkpoint.

ComfyUI's node Train Flow Adapter is the other face of the same trainer: it reads the same prepared
clips and writes the same file, and the same seed gives the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataConfig, build_dataset
from ..data.prepared import Encoders, PreparedClips, dataset_sources, prepare_clips
from ..models import FlowAdapter, FlowAdapterConfig, S2DMConfig
from ..models.checkpoint import Checkpoint
from ..pipelines.attention import attach_adapter
from ..pipelines.modules import build, build_tokenizer, decode, tokenize
from ..settings import SettingsError, to_dict
from ..video import write_contact_sheet
from .curves import write_loss_picture
from .flow_adapter import AdapterSettings, AdapterTrainer, Denoiser, new_adapter
from .loop import at_stop_signals
from .lora import attach_lora
from .models import frozen_vae, load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterRunConfig(AdapterSettings):
    """A run of `s2dm train adapter`.

    `checkpoint` holds the image model: U-Net, VAE and text encoder, which all stay as they are.
    `clips_folder` holds prepared clips, of this command or of ComfyUI's Prepare Clips; without,
    those of `data` are prepared in the run folder. `fusion` is how flow joins. `mixed_precision`
    is the U-Net's: "no" or "bf16". A sample sheet is drawn every `sample_every` steps, if not 0.
    """

    output: str = "runs/adapter"
    checkpoint: str = ""
    clips_folder: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    fusion: str = "channel"
    width: int = 256
    hidden: int = 64
    mixed_precision: str = "no"
    gradient_checkpointing: bool = True
    sample_every: int = 0
    threads: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixed_precision not in ("no", "bf16"):
            raise SettingsError(
                f"mixed_precision must be 'no' or 'bf16', got {self.mixed_precision!r}: small "
                "gradients vanish in fp16."
            )
        if not self.checkpoint:
            raise SettingsError(
                "checkpoint must name a file with the image model to train an adapter for, got "
                "none. A model in the layout of diffusers becomes one by s2dm convert."
            )

    @property
    def settings(self) -> AdapterSettings:
        """Those of the trainer alone."""
        names = [entry.name for entry in dataclasses.fields(AdapterSettings)]
        return AdapterSettings(**{name: getattr(self, name) for name in names})


def train_adapter(config: AdapterRunConfig) -> AdapterTrainer:
    """Train an adapter as `config` says, or go on with the run in its folder.

    The folder's `export.safetensors` is the adapter alone, `lora.safetensors` the LoRA, if there is
    to be one. Of several processes, started by
    accelerate or torchrun, each takes `clips` clips of its own, and their gradients are averaged.

    Raises:
        SettingsError: a setting or the checkpoint doesn't serve. ClipsError: nor do the clips.
        TrainingError: the run can't start or go on.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if config.threads > 0:
        torch.set_num_threads(config.threads)
    # The others wait for the one that prepares the clips.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(kwargs_handlers=[patience])
    device = accelerator.device
    start = load_model(config.checkpoint, ["unet", "vae", "text_encoder"])
    vae = frozen_vae(*start["vae"], device)
    with accelerator.main_process_first():  # the others find what it prepares
        clips = _clips(config, start, vae, device)
    adapter = new_adapter(
        FlowAdapterConfig.for_unet(
            start.config.unet, fusion=config.fusion, width=config.width, hidden=config.hidden
        ),
        config.seed,
    ).to(device)
    shared: dict[str, Any] = {"process": accelerator.process_index}
    if accelerator.num_processes > 1:
        shared["average"] = lambda value: accelerator.reduce(value, "mean")
    with _stopping() as stop:
        trainer = AdapterTrainer(
            config.settings,
            adapter,
            denoiser_of(build(start, "unet"), start.config, adapter, clips, device, config),
            clips,
            config.output,
            config.resume,
            between=stop,
            **shared,
        )
        base = Path(config.checkpoint).stem
        try:
            with _bar(config, trainer, vae) as on_step:
                trainer.run(on_step)
        except KeyboardInterrupt:
            logger.warning("stopped at step %d; the same command goes on", trainer.step)
        if trainer.step and accelerator.is_main_process:
            trainer.export(trainer.folder.export, base, trainer.folder.path / "lora.safetensors")
            write_loss_picture(trainer.folder.path / "loss.png", trainer.losses)
    if accelerator.num_processes > 1:
        accelerator.end_training()
    return trainer


def denoiser_of(
    unet: nn.Module,
    model: S2DMConfig,
    adapter: FlowAdapter,
    clips: PreparedClips,
    device: torch.device,
    config: AdapterRunConfig,
) -> Denoiser:
    """The U-Net of a model, frozen, with an adapter on it.

    Raises:
        SettingsError: the clips were prepared with another VAE or text encoder.
    """
    scale, schedule = model.vae.scaling_factor, model.schedule
    expected = model.unet.in_channels, model.unet.context_dim
    got = clips.latent_shape[0], clips.empty_text.shape[-1]
    if got != expected:
        raise SettingsError(
            f"clips_folder: expected latents of {expected[0]} channels and prompts of width "
            f"{expected[1]}, as the checkpoint has them, got {got[0]} and {got[1]}. Prepare the "
            "clips with this checkpoint's VAE and text encoder."
        )
    unet.requires_grad_(False).to(device)
    attach_adapter(unet, adapter)
    lora = None
    if config.lora_rank:
        lora = attach_lora(unet, model.unet, config.lora_rank, config.seed).to(device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()  # diffusers computes blocks again in training alone
    size = (clips.latent_shape[1], clips.latent_shape[2])
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")

    def predict(x_t: Tensor, t: Tensor, tokens: Tensor, text: Tensor) -> Tensor:
        told = {"flow_tokens": tokens, "flow_size": size}
        with half:
            return unet(x_t, t, text, cross_attention_kwargs=told).sample

    kind = schedule.prediction_type
    return Denoiser(predict, schedule.alphas_cumprod(), kind, device, lambda x: x * scale, lora)


def _clips(
    config: AdapterRunConfig, start: Checkpoint, vae: nn.Module, device: torch.device
) -> PreparedClips:
    if config.clips_folder:
        return PreparedClips(config.clips_folder)
    from tqdm.auto import tqdm

    clips = build_dataset(config.data)
    key = str([to_dict(config.data), getattr(clips, "fingerprint", None)])
    with tqdm(total=len(clips), desc="preparing clips", mininterval=5.0) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        return prepare_clips(
            Path(config.output) / "clips",
            dataset_sources(clips, key),
            len(clips),
            encoders_of(start, vae, device),
            progress,
        )


def encoders_of(start: Checkpoint, vae: nn.Module, device: torch.device) -> Encoders:
    """VAE and text encoder of a checkpoint as what prepares clips."""
    tokenizer = build_tokenizer(start.config)
    text_encoder = build(start, "text_encoder").eval().to(device)

    @torch.no_grad()
    def latents(frames: Tensor) -> Tensor:
        parts = [vae.encode(part.to(device) * 2 - 1) for part in frames.split(8)]
        return torch.cat([part.latent_dist.mode() for part in parts]).float().cpu()

    @torch.no_grad()
    def text(caption: str) -> Tensor:
        ids = tokenize(tokenizer, [caption]).to(device)
        return text_encoder(ids).last_hidden_state[0].float().cpu()

    return Encoders(latents, text)


@contextlib.contextmanager
def _bar(
    config: AdapterRunConfig, trainer: AdapterTrainer, vae: nn.Module
) -> Iterator[Callable[[AdapterTrainer], None]]:
    from tqdm.auto import tqdm

    folder = trainer.folder
    told = {"desc": "adapter", "mininterval": 5.0, "disable": trainer.process != 0}
    with tqdm(total=config.steps, initial=trainer.step, **told) as bar:

        def on_step(trainer: AdapterTrainer) -> None:
            bar.update()
            bar.set_postfix(loss=f"{trainer.losses[-1]:.4f}", refresh=False)
            due = config.sample_every and trainer.step % config.sample_every == 0
            if due and trainer.process == 0:
                path = folder.samples / f"step_{trainer.step:07d}.png"
                latents = trainer.sample() / vae.config.scaling_factor
                write_contact_sheet(path, [decode(vae, latents)])

        yield on_step


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM end the run at the next chunk, where the weights are whole."""
    asked: list[int] = []

    def between() -> None:
        if asked:
            raise KeyboardInterrupt

    with at_stop_signals(asked.append):
        yield between
