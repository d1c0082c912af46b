"""Stage 2 of S2DM (paper, sections 3.3 and 3.4): a prompt and a flow field make a clip."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..flow import FlowField
from ..models import (
    STAGE_2,
    Checkpoint,
    S2DMConfig,
    SamplingConfig,
    ScheduleConfig,
    load_checkpoint,
    save_checkpoint,
    unknown_words,
    unknown_words_message,
    whole_cells,
)
from ..sector import (
    ANCHOR_END,
    SHARED,
    Anchor,
    NoiseLevels,
    NoiseSharing,
    ReferenceStates,
    guide,
    implied_prediction,
    predicted_x0,
    release,
    release_levels,
    sample,
)
from .attention import Beside, attach_adapter, is_attached
from .modules import build, build_tokenizer, to_checkpoint
from .pictures import on_canvas, picture_of
from .wrapped import FlowAdapterModel

OUTPUT_TYPES = ("pt", "pil", "latent")
"""The forms that a clip comes in: a tensor, PIL images, latents."""

logger = logging.getLogger(__name__)


@dataclass
class FlowToVideoOutput(BaseOutput):
    """What the pipeline returns.

    frames: (N, 3, H, W) float32 in [0, 1] for "pt", a list of PIL images for "pil", latents
        (N, C, h, w) for "latent".
    """

    frames: Tensor | list[Any]


def ddim_scheduler(schedule: ScheduleConfig) -> DDIMScheduler:
    """The paper's sampler, with the timesteps that ComfyUI's "ddim" and "ddim_uniform" take."""
    return DDIMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        prediction_type=schedule.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=True,
        clip_sample=False,
    )


class FlowToVideoPipeline(DiffusionPipeline):
    """Text and optical flow to video, frames denoised side by side from one noise.

    Works with any Stable Diffusion 1.x U-Net, text encoder and VAE whose sizes fit the adapter,
    and with any diffusers scheduler.

    Args:
        vae, text_encoder, tokenizer, unet: as in `StableDiffusionPipeline`.
        scheduler: DDIM in the checkpoints of this project.
        flow_adapter: encodes the flow and holds its keys and values for each layer.
        s2dm_config: an `S2DMConfig` as a dictionary; `save_single_file` needs it, and it says
            which steps and guidance to take where a call doesn't.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    # The adapter works inside the U-Net's forward, so it can't leave the device by itself.
    _exclude_from_cpu_offload = ["flow_adapter"]  # noqa: RUF012 (diffusers' name and type)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        flow_adapter: FlowAdapterModel,
        s2dm_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            flow_adapter=flow_adapter,
        )
        self.register_to_config(s2dm_config=s2dm_config)
        self._told: tuple[str | None, ...] = ()
        attach_adapter(unet, flow_adapter.adapter)

    # ------------------------------------------------------------------ files

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], torch_dtype: torch.dtype = torch.float32
    ) -> FlowToVideoPipeline:
        """Build the pipeline from an S2DM checkpoint, the file that the ComfyUI nodes read.

        Args:
            path: a `.safetensors` file with all parts.
            torch_dtype: type of the weights in memory.

        Raises:
            CheckpointError: the file is broken, or one of the parts is missing.
        """
        return cls.from_checkpoint(load_checkpoint(path, STAGE_2), torch_dtype)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, torch_dtype: torch.dtype = torch.float32
    ) -> FlowToVideoPipeline:
        """Build the pipeline from a checkpoint that was read.

        Raises:
            CheckpointError: one of the parts is missing.
        """
        components = cls._build(checkpoint)
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                # Not the pipeline's own `to`, which warns of a mistake that this is not.
                torch.nn.Module.to(component.eval(), torch_dtype)
        return cls(**components, s2dm_config=checkpoint.config.to_dict())

    @classmethod
    def _build(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        """The pipeline's modules."""
        modules = {part: build(checkpoint, part) for part in STAGE_2}
        return modules | {
            "tokenizer": build_tokenizer(checkpoint.config),
            "scheduler": ddim_scheduler(checkpoint.config.schedule),
            "flow_adapter": FlowAdapterModel.wrap(modules["flow_adapter"]),
        }

    def save_single_file(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """Write all parts to one S2DM checkpoint.

        Args:
            path: the `.safetensors` file to write; replaced only when the new one is complete.
            dtype: type of the weights in the file; as they are if None.

        Raises:
            ValueError: the pipeline was built without an `s2dm_config`.
            CheckpointError: the config is not that of the networks.
        """
        settings = self.config.get("s2dm_config")
        if settings is None:
            raise ValueError(
                "The pipeline has no s2dm_config, which a checkpoint needs. Pass "
                "s2dm_config=S2DMConfig(...).to_dict() when you build it."
            )
        checkpoint = to_checkpoint(S2DMConfig.from_dict(settings), self._modules_by_part())
        save_checkpoint(path, checkpoint, dtype)

    def _modules_by_part(self) -> dict[str, torch.nn.Module]:
        return {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "flow_adapter": self.flow_adapter.adapter,
        }

    # --------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        flow: FlowField,
        negative_prompt: str | None = "",
        height: int | None = None,
        width: int | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        reference: Any | None = None,
        seed: int | None = None,
        noise_sharing: NoiseSharing = SHARED,
        chunk_size: int = 8,
        output_type: str = "pt",
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
    ) -> FlowToVideoOutput:
        """Generate a clip that follows `flow`.

        Args:
            prompt: what the clip shows. Longer prompts than CLIP's 77 tokens are encoded in
                pieces, as ComfyUI does.
            flow: backward flow of every frame to the first one; its length is the clip's.
            negative_prompt: the text's null label is the empty prompt.
            height, width: pixels of the clip; the flow's own if None. The flow is resized.
                The model works in steps of 8 pixels: other sizes are generated one step
                larger and cropped.
            sampling: steps, guidance, start of the flow and anchor, as a `SamplingConfig`, or
                entries of one in place of what the checkpoint recommends, such as `{"steps": 50}`.
            reference: a picture of yours that becomes frame 1, where the sampling is anchored: a
                PIL image, or (3, H, W) in [0, 1]. It is scaled to cover the clip and cropped at
                the centre. Without one, frame 1 is drawn first, from the same noise.
            seed: of the initial noise and of the step noise; random if None.
            noise_sharing: how the frames share their noise, at the start and at every step.
            chunk_size: how many frames the networks see at a time. Frames do not see one
                another, so the result is the same to rounding, and memory does not grow with
                the length of the clip.
            output_type: "pt", "pil" or "latent".
            callback_on_step_end: called after each step with its number, counted from 0 through
                frame 1 (where it is drawn first) and the clip, and the latents there,
                (1, C, h, w) and (N, C, h, w); may raise to stop.

        Returns:
            `FlowToVideoOutput`

        Raises:
            ValueError: an argument is out of its range.
        """
        sampling = self._sampling(sampling)
        check_arguments(prompt, output_type, chunk_size, noise_sharing)
        if reference is not None and not sampling.anchor_end:
            raise ValueError(
                "Expected no reference, because the sampling isn't anchored and nothing would see "
                f'it, got one. Leave it out, or set sampling={{"anchor_end": {ANCHOR_END}}}.'
            )
        size = (height or flow.height, width or flow.width)
        seed = torch.Generator().seed() if seed is None else seed
        denoise = partial(
            self._denoise,
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=size,
            sampling=sampling,
            seed=seed,
            noise_sharing=noise_sharing,
            chunk_size=chunk_size,
            on_step=counted(callback_on_step_end),
        )
        anchor = None
        if sampling.anchor_end and len(flow) > 1:
            if reference is None:
                frame = self.decode_latents(denoise(FlowField.zeros(1, *size)))
            else:
                frame = on_canvas(picture_of(reference, *size), self.vae_factor)
            anchor = self._anchor(frame, flow.resize(*size), chunk_size)
        result = self._output(denoise(flow, anchor=anchor), size, output_type, chunk_size)
        self.maybe_free_model_hooks()
        return FlowToVideoOutput(frames=result)

    def _denoise(
        self,
        flow: FlowField,
        *,
        prompt: str,
        negative_prompt: str | None,
        size: tuple[int, int],
        sampling: SamplingConfig,
        seed: int,
        noise_sharing: NoiseSharing,
        chunk_size: int,
        on_step: Callable[[Tensor], None],
        anchor: Anchor | None = None,
    ) -> Tensor:
        """Latents (N, C, h, w) of a clip that follows `flow`, on the canvas of `size`."""
        guidance_scale, flow_guidance_scale = sampling.guidance_scale, sampling.flow_guidance_scale
        if flow_guidance_scale == guidance_scale:
            flow_guidance_scale = None  # the same from two predictions in place of three
        self._tell_unknown_words(prompt, negative_prompt)
        if not is_attached(self.unet, self.flow_adapter.adapter):
            # Attention slicing, xFormers and fused projections put their own attention there.
            attach_adapter(self.unet, self.flow_adapter.adapter)
        canvas = self._canvas(*size)
        if canvas != size:
            flow = flow.resize(*size).pad(*canvas)
        shape = (self.vae.config.latent_channels, *(side // self.vae_factor for side in canvas))
        latent_size = shape[1], shape[2]
        labels = self._labels(
            prompt, negative_prompt, flow, latent_size, guidance_scale, flow_guidance_scale
        )
        without_flow = [(text, self._null_tokens(len(flow), latent_size)) for text, _ in labels]
        generator = torch.Generator().manual_seed(seed)
        noise = noise_sharing.draw(len(flow), shape, generator).to(self._execution_device)
        levels = NoiseLevels(self.scheduler.alphas_cumprod)
        flow_from = levels.timestep(sampling.flow_start)
        released = release_levels(sampling.anchor_end, levels.sigma)
        states = ReferenceStates()

        def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
            acts = bool(sampling.flow_start < 1 and timestep <= flow_from)
            current = labels if acts else without_flow
            # Equal frames stay equal until something tells them apart: one is enough.
            several = not _all_equal(latents, *(tokens for _, tokens in current))
            prediction = torch.empty_like(latents if several else latents[:1])
            for frames in torch.arange(len(prediction)).split(chunk_size):
                reference = None
                if sampling.reference_attention and several:
                    first = frames[0] == 0
                    reference = partial(states.beside, groups=len(current), first=first)
                parts = self._predict(latents[frames], timestep, current, frames, reference)
                if len(parts) == 1:
                    prediction[frames] = parts[0]
                elif len(parts) == 2:
                    prediction[frames] = guide(*parts, guidance_scale)
                else:
                    prediction[frames] = guide(
                        parts[0], parts[2], guidance_scale, parts[1], flow_guidance_scale
                    )
            prediction = prediction.expand_as(latents)
            if anchor is None or not acts:
                return prediction
            # Here, and not in the prediction of each label, because guidance overshoots.
            sigma = levels.sigma_at(timestep)
            kind = self.scheduler.config.prediction_type
            known = (latents, torch.tensor(1 / (sigma**2 + 1)), kind)
            guess = anchor.pull(predicted_x0(prediction, *known), release(sigma, *released))
            return implied_prediction(guess, *known)

        with self.progress_bar(total=sampling.steps) as progress:

            def after_step(_: int, latents: Tensor) -> None:
                progress.update()
                on_step(latents)

            return sample(
                denoise,
                self.scheduler,
                noise,
                sampling.steps,
                generator,
                noise_sharing,
                after_step,
            )

    def _anchor(self, picture: Tensor, flow: FlowField, chunk_size: int) -> Anchor:
        """The anchor of a clip to frame 1, (1, 3, H, W) in [0, 1] on the canvas."""
        flow = flow.pad(*picture.shape[-2:])
        return Anchor.of(picture, flow, self._encode, chunk_size=chunk_size)

    def _encode(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) in [0, 1] on the canvas as latents, as the U-Net sees them."""
        frames = frames.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(frames * 2 - 1).latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    @property
    def sampling(self) -> SamplingConfig:
        """What the checkpoint recommends; without an `s2dm_config`, what the paper does."""
        settings = self.config.get("s2dm_config") or {}
        return SamplingConfig.from_dict(settings.get("sampling", {}))

    def _sampling(self, given: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
        return given if isinstance(given, SamplingConfig) else self.sampling.replacing(given)

    @property
    def vae_factor(self) -> int:
        """Pixels along each side of one latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels that is generated for a clip of this size, in whole latent cells."""
        return whole_cells(height, self.vae_factor), whole_cells(width, self.vae_factor)

    def _tell_unknown_words(self, *prompts: str | None) -> None:
        """Warn of words that the checkpoint doesn't know, once for the same prompts in a row."""
        if prompts == self._told:
            return
        self._told = prompts
        spec = (self.config.s2dm_config or {}).get("tokenizer")
        words = unknown_words(" ".join(prompt or "" for prompt in prompts), spec)
        if words:
            logger.warning("%s", unknown_words_message(words))

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode a prompt to (1, 77 k, d), k pieces of 75 tokens between start and end tokens."""
        tokenizer, length = self.tokenizer, self.tokenizer.model_max_length
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = length - 2
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
        rows = [
            [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            + [tokenizer.pad_token_id] * (room - len(piece))
            for piece in pieces
        ]
        rows = torch.tensor(rows, device=self._execution_device)
        states = self.text_encoder(rows).last_hidden_state
        # From a folder, transformers takes the type that is stored and diffusers float32.
        return states.flatten(0, 1)[None].to(self.unet.dtype)

    @torch.no_grad()
    def encode_flow(self, flow: FlowField, size: tuple[int, int] | None = None) -> Tensor:
        """Encode a flow field to tokens (N, tokens, width).

        Args:
            flow: of any size.
            size: height and width of the latents; those of a clip of the flow's size if None.
        """
        if size is None:
            height, width = self._canvas(flow.height, flow.width)
            size = height // self.vae_factor, width // self.vae_factor
        return self.flow_adapter(flow, size)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, chunk_size: int = 8) -> Tensor:
        """Decode (N, C, h, w) to frames (N, 3, 8 h, 8 w), float32 in [0, 1] on the CPU."""
        scaled = latents / self.vae.config.scaling_factor
        frames = [
            self.vae.decode(part.to(self.vae.dtype)).sample.float().cpu().add_(1).div_(2)
            for part in scaled.split(chunk_size)
        ]
        return torch.cat(frames).clamp_(0, 1)

    def _output(
        self, latents: Tensor, size: tuple[int, int], output_type: str, chunk_size: int
    ) -> Tensor | list[Any]:
        """Latents (N, C, h, w) as frames of `size` (height, width) in the form asked for."""
        if output_type == "latent":
            return latents
        frames = self.decode_latents(latents, chunk_size)[..., : size[0], : size[1]]
        return _to_pil(frames) if output_type == "pil" else frames

    def _labels(
        self,
        prompt: str,
        negative_prompt: str,
        flow: FlowField,
        size: tuple[int, int],
        guidance_scale: float,
        flow_guidance_scale: float | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Text (1, L, d) and flow tokens (N, tokens, width) of each prediction that is needed."""
        conditional = (self.encode_prompt(prompt), self.encode_flow(flow, size))
        if guidance_scale == 1 and flow_guidance_scale in (None, 1):
            return [conditional]
        negative = self.encode_prompt(negative_prompt or "")
        texts = _same_length([conditional[0], negative])
        conditional, negative = (texts[0], conditional[1]), texts[1]
        unconditional = (negative, self._null_tokens(len(flow), size))
        if flow_guidance_scale == 1:  # the prediction under null labels has no weight
            return [(negative, conditional[1]), conditional]
        if flow_guidance_scale is None:
            return [unconditional, conditional]
        return [unconditional, (negative, conditional[1]), conditional]

    def _null_tokens(self, frames: int, size: tuple[int, int]) -> Tensor:
        return self.flow_adapter.adapter.null_tokens(frames, size).detach()

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        labels: list[tuple[Tensor, Tensor]],
        frames: Tensor,
        reference: Beside | None = None,
    ) -> list[Tensor]:
        """ε_θ of the same frames under each of the labels, as one batch, in float32."""
        text = torch.cat([text.expand(len(frames), -1, -1) for text, _ in labels])
        tokens = torch.cat([tokens[frames] for _, tokens in labels])
        flow = {"flow_tokens": tokens, "flow_size": tuple(latents.shape[-2:])}
        prediction = self.unet(
            latents.to(self.unet.dtype).repeat(len(labels), 1, 1, 1),
            timestep,
            encoder_hidden_states=text,
            cross_attention_kwargs={**flow, "reference": reference},
        ).sample
        return list(prediction.to(latents.dtype).chunk(len(labels)))


def check_arguments(
    prompt: str, output_type: str, chunk_size: int, noise_sharing: NoiseSharing
) -> None:
    """Check the arguments that both pipelines take.

    Raises:
        ValueError: one of them is out of its range, or not what it should be.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"Expected one prompt as text, got {type(prompt).__name__}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, not {output_type!r}.")
    if chunk_size < 1:
        raise ValueError(f"Expected chunk_size of at least 1, got {chunk_size}.")
    if not isinstance(noise_sharing, NoiseSharing):
        raise ValueError(
            f'Expected a NoiseSharing, such as NoiseSharing("shared"), got {noise_sharing!r}.'
        )


def counted(
    callback: Callable[[int, Tensor], None] | None,
) -> Callable[[Tensor], None]:
    """A user's callback with a number that goes on from one sampling to the next."""
    steps = itertools.count()

    def on_step(latents: Tensor) -> None:
        if callback is not None:
            callback(next(steps), latents)

    return on_step


def _all_equal(*parts: Tensor) -> bool:
    """Whether the rows of each of the tensors equal its first one."""
    return all(bool((part == part[:1]).all()) for part in parts)


def _same_length(texts: list[Tensor]) -> list[Tensor]:
    """Repeat shorter prompts whole; attention over repeated tokens is what it was before."""
    length = math.lcm(*(text.shape[1] for text in texts))
    return [text.repeat(1, length // text.shape[1], 1) for text in texts]


def _to_pil(frames: Tensor) -> list[Any]:
    from PIL import Image

    from ..video import to_uint8

    return [Image.fromarray(to_uint8(frame)) for frame in frames]
