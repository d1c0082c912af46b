"""Stage 2 of S2DM (paper, sections 3.3 and 3.4): a prompt and a flow field make a clip."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..flow import FlowField
from ..flow.inverse import key_frame, rebase
from ..models import (
    STAGE_2,
    Checkpoint,
    S2DMConfig,
    SamplingConfig,
    load_checkpoint,
    save_checkpoint,
    unknown_words,
    unknown_words_message,
    whole_cells,
)
from ..sector import ANCHOR_END, SHARED, Anchor, NoiseSharing, sample
from .attention import attach_adapter, is_attached
from .denoiser import Denoiser, Label, guidance_scales
from .modules import build, build_tokenizer, ddim_scheduler, decode, to_checkpoint
from .pictures import on_canvas, picture_of, to_pil
from .request import Request
from .wrapped import FlowAdapterModel

logger = logging.getLogger(__name__)


@dataclass
class FlowToVideoOutput(BaseOutput):
    """What the pipeline returns.

    frames: (N, 3, H, W) float32 in [0, 1] for "pt", a list of PIL images for "pil", latents
        (N, C, h, w) for "latent".
    """

    frames: Tensor | list[Any]


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
                the centre. Without one, frame 1 is drawn first, from the same noise; with
                `key_frame` the frame that moves most before it.
            seed: of the initial noise and of the step noise; random if None.
            noise_sharing: how the frames share their noise, at the start and at every step.
            chunk_size: how many frames the networks see at a time. Frames do not see one
                another, so the result is the same to rounding, and memory does not grow with
                the length of the clip.
            output_type: "pt", "pil" or "latent".
            callback_on_step_end: called after each step with its number, counted from 0 through
                key frame and frame 1 (where they are drawn first) and the clip, and the latents
                there, (1, C, h, w) twice and (N, C, h, w); may raise to stop.

        Returns:
            `FlowToVideoOutput`

        Raises:
            ValueError: an argument is out of its range.
        """
        request = Request(
            prompt,
            negative_prompt,
            (height or flow.height, width or flow.width),
            self._sampling(sampling),
            torch.Generator().seed() if seed is None else seed,
            noise_sharing,
            chunk_size,
            output_type,
            callback_on_step_end,
        )
        size, anchor_end = request.size, request.sampling.anchor_end
        if reference is not None and not anchor_end:
            raise ValueError(
                "Expected no reference, because the sampling isn't anchored and nothing would see "
                f'it, got one. Leave it out, or set sampling={{"anchor_end": {ANCHOR_END}}}.'
            )
        anchor = None
        if anchor_end and len(flow) > 1:
            if reference is None:
                frame = self._first_frame(request, flow)
            else:
                frame = on_canvas(picture_of(reference, *size), self.vae_factor)
            anchor = self._anchor(request, frame, flow)
        frames = self._output(request, self._denoise(request, flow, anchor))
        self.maybe_free_model_hooks()
        return FlowToVideoOutput(frames=frames)

    def _first_frame(self, request: Request, flow: FlowField) -> Tensor:
        """Frame 1 of a clip, (1, 3, H, W) in [0, 1] on the canvas.

        Zero flow doesn't say where anybody is. Drawn after a key frame, frame 1 shows them there.
        """
        anchor, still = None, FlowField.zeros(1, *request.size)
        key = key_frame(flow) if request.sampling.key_frame else 0
        if key:  # 0 where nothing moves
            # The flow has to act from the start, where it is decided who stands where.
            sampling = replace(request.sampling, flow_start=0.0)
            told, only = replace(request, sampling=sampling), slice(key, key + 1)
            picture = self.decode_latents(self._denoise(told, flow, frames=only))
            anchor = self._anchor(request, picture, rebase(flow, [key, 0])).of_frame(1)
        return self.decode_latents(self._denoise(request, still, anchor))

    def _denoise(
        self,
        request: Request,
        flow: FlowField,
        anchor: Anchor | None = None,
        frames: slice = slice(None),
    ) -> Tensor:
        """Latents (N, C, h, w) of a clip that follows `flow`, or of some frames, on the canvas."""
        sampling = request.sampling
        self._tell_unknown_words(request.prompt, request.negative_prompt)
        if not is_attached(self.unet, self.flow_adapter.adapter):
            # Attention slicing, xFormers and fused projections put their own attention there.
            attach_adapter(self.unet, self.flow_adapter.adapter)
        canvas = self._canvas(*request.size)
        if canvas != request.size:
            flow = flow.resize(*request.size).pad(*canvas)
        latent_size = canvas[0] // self.vae_factor, canvas[1] // self.vae_factor
        shape = (self.vae.config.latent_channels, *latent_size)
        generator = torch.Generator().manual_seed(request.seed)
        noise = request.noise_sharing.draw(len(flow), shape, generator)[frames]
        labels = self._labels(request, flow, latent_size)
        denoiser = Denoiser(
            self.unet,
            self.scheduler,
            [(text, tokens[frames]) for text, tokens in labels],
            self._null_tokens(len(noise), latent_size),
            sampling,
            request.chunk_size,
            anchor,
        )
        with self.progress_bar(total=sampling.steps) as progress:

            def after_step(_: int, latents: Tensor) -> None:
                progress.update()
                request.step_done(latents)

            return sample(
                denoiser,
                self.scheduler,
                noise.to(self._execution_device),
                sampling.steps,
                generator,
                request.noise_sharing,
                after_step,
            )

    def _anchor(self, request: Request, picture: Tensor, flow: FlowField) -> Anchor:
        """The anchor of a clip to frame 1, (1, 3, H, W) in [0, 1] on the canvas."""
        flow = flow.resize(*request.size).pad(*picture.shape[-2:])
        return Anchor.of(picture, flow, self._encode, chunk_size=request.chunk_size)

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

    def decode_latents(self, latents: Tensor, chunk_size: int = 8) -> Tensor:
        """Decode (N, C, h, w) to frames (N, 3, 8 h, 8 w), float32 in [0, 1] on the CPU."""
        return decode(self.vae, latents / self.vae.config.scaling_factor, chunk_size)

    def _output(self, request: Request, latents: Tensor) -> Tensor | list[Any]:
        """Latents (N, C, h, w) as frames of the size and in the form asked for."""
        if request.output_type == "latent":
            return latents
        height, width = request.size
        frames = self.decode_latents(latents, request.chunk_size)[..., :height, :width]
        return to_pil(frames) if request.output_type == "pil" else frames

    def _labels(self, request: Request, flow: FlowField, size: tuple[int, int]) -> list[Label]:
        """Those of each prediction that is needed, for latents of this size."""
        guidance_scale, flow_guidance_scale = guidance_scales(request.sampling)
        conditional = (self.encode_prompt(request.prompt), self.encode_flow(flow, size))
        if guidance_scale == 1 and flow_guidance_scale in (None, 1):
            return [conditional]
        negative = self.encode_prompt(request.negative_prompt or "")
        texts = _same_length([conditional[0], negative])
        conditional, negative = (texts[0], conditional[1]), texts[1]
        unconditional = (negative, self._null_tokens(len(flow), size))
        if flow_guidance_scale == 1:  # the prediction under null labels has no weight
            return [(negative, conditional[1]), conditional]
        if flow_guidance_scale is None:
            return [unconditional, conditional]
        return [unconditional, (negative, conditional[1]), conditional]

    def _null_tokens(self, num_frames: int, size: tuple[int, int]) -> Tensor:
        return self.flow_adapter.adapter.null_tokens(num_frames, size).detach()


def _same_length(texts: list[Tensor]) -> list[Tensor]:
    """Repeat shorter prompts whole; attention over repeated tokens is what it was before."""
    length = math.lcm(*(text.shape[1] for text in texts))
    return [text.repeat(1, length // text.shape[1], 1) for text in texts]
