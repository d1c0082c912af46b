"""Stage 2 of S2DM (paper, sections 3.3 and 3.4): a prompt and a flow field make a clip."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..flow import FlowField
from ..models import (
    PARTS,
    S2DMConfig,
    SamplingConfig,
    ScheduleConfig,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from ..models import build as models
from ..sector import draw_noise, guide, sample
from .arguments import check_arguments
from .flow_adapter import FlowAdapterModel


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
        models.attach_adapter(unet, flow_adapter.adapter)

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
        config, states = load_checkpoint(path, cls._parts(read_config(path)))
        components = cls._build(config, states)
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                # Not the pipeline's own `to`, which warns of a mistake that this is not.
                torch.nn.Module.to(component.eval(), torch_dtype)
        return cls(**components, s2dm_config=_only(config, states).to_dict())

    @classmethod
    def _parts(cls, config: S2DMConfig) -> tuple[str, ...]:
        """The parts of a checkpoint that the pipeline is built from."""
        return ("unet", "text_encoder", "vae", "flow_adapter")

    @classmethod
    def _build(cls, config: S2DMConfig, states: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """The pipeline's modules, built from the parts of a checkpoint."""
        adapter = models.build_flow_adapter(config.flow_adapter, states["flow_adapter"])
        return {
            "vae": models.build_vae(config.vae, states["vae"]),
            "text_encoder": models.build_text_encoder(config.text_encoder, states["text_encoder"]),
            "tokenizer": models.build_tokenizer(config),
            "unet": models.build_unet(config.unet, states["unet"]),
            "scheduler": ddim_scheduler(config.schedule),
            "flow_adapter": FlowAdapterModel.wrap(adapter),
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
        config = S2DMConfig.from_dict(settings)
        states = self._states(config)
        save_checkpoint(path, _only(config, states), states, dtype)

    def _states(self, config: S2DMConfig) -> dict[str, dict[str, Tensor]]:
        """The weights of the pipeline's modules, as the parts of a checkpoint."""
        return {
            "unet": models.unet_state(self.unet, config.unet),
            "vae": models.vae_state(self.vae, config.vae),
            "text_encoder": models.text_encoder_state(self.text_encoder, config.text_encoder),
            "flow_adapter": self.flow_adapter.adapter.state_dict(),
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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        flow_guidance_scale: float | None = None,
        flow_start: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise_sharing: str = "shared",
        noise_share: float = 0.5,
        chunk_size: int = 8,
        output_type: str = "pt",
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
    ) -> FlowToVideoOutput:
        """Generate a clip that follows `flow`.

        Steps, guidance and start of the flow are those that the checkpoint recommends
        (`sampling`) where they are None.

        Args:
            prompt: what the clip shows. Longer prompts than CLIP's 77 tokens are encoded in
                pieces, as ComfyUI does.
            flow: backward flow of every frame to the first one; its length is the clip's.
            negative_prompt: the text's null label is the empty prompt.
            height, width: pixels of the clip; the flow's own if None. The flow is resized.
                The model works in steps of 8 pixels: other sizes are generated one step
                larger and cropped.
            num_inference_steps: steps of the scheduler (20 in the paper).
            guidance_scale: s of classifier-free guidance (7.5 in the paper), between null text
                with null flow and prompt with flow. 1 turns it off.
            flow_guidance_scale: a scale of its own for the flow, see `s2dm.sector.guide`; the
                text keeps `guidance_scale`. With 1 the negative prompt sees the flow too; equal
                to `guidance_scale` it is the paper's guidance of both together.
            flow_start: the part of the noise schedule, from its noisy start on, in which the flow
                doesn't act yet, 0 to 1 (0 in the paper). With shared noise all frames are the
                same so long: the room is settled for all of them before they part.
            seed: seed of the initial noise and of the step noise; random if neither this nor
                `generator` is given.
            generator: a CPU generator instead of a seed.
            noise_sharing, noise_share: "shared" (paper), "independent" or "mixed", see
                `s2dm.sector.draw_noise`; for the initial noise and for every step.
            chunk_size: how many frames the networks see at a time. Frames do not see one
                another, so the result is the same to rounding, and memory does not grow with
                the length of the clip.
            output_type: "pt", "pil" or "latent".
            callback_on_step_end: called after each step with its number from 0 and the latents
                (N, C, h, w); may raise to stop.

        Returns:
            `FlowToVideoOutput`

        Raises:
            ValueError: an argument is out of its range.
        """
        num_inference_steps, guidance_scale, flow_guidance_scale, flow_start = self._sampling(
            num_inference_steps, guidance_scale, flow_guidance_scale, flow_start
        )
        if flow_guidance_scale == guidance_scale:
            flow_guidance_scale = None  # the same from two predictions in place of three
        check_arguments(prompt, output_type, chunk_size, num_inference_steps)
        if not models.is_attached(self.unet, self.flow_adapter.adapter):
            # Attention slicing, xFormers and fused projections put their own attention there.
            models.attach_adapter(self.unet, self.flow_adapter.adapter)
        if seed is not None and generator is not None:
            raise ValueError("Give a seed or a generator, not both.")
        if generator is None:
            generator = torch.Generator()
            generator.seed() if seed is None else generator.manual_seed(seed)
        height, width = height or flow.height, width or flow.width

        device = self._execution_device
        canvas = self._canvas(height, width)
        shape = (self.vae.config.latent_channels, *(side // self.vae_factor for side in canvas))
        flow = _on_canvas(flow, (height, width), canvas)
        labels = self._labels(prompt, negative_prompt, flow, guidance_scale, flow_guidance_scale)
        without_flow = [(text, self._null_tokens(len(flow))) for text, _ in labels]
        # As ComfyUI counts the percent of a schedule.
        flow_from = (1 - flow_start) * (self.scheduler.config.num_train_timesteps - 1)
        noise = draw_noise(len(flow), shape, generator, noise_sharing, noise_share).to(device)

        def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
            prediction = torch.empty_like(latents)
            current = labels if flow_start < 1 and timestep <= flow_from else without_flow
            for frames in torch.arange(len(latents)).split(chunk_size):
                parts = self._predict(latents[frames], timestep, current, frames)
                if len(parts) == 1:
                    prediction[frames] = parts[0]
                elif len(parts) == 2:
                    prediction[frames] = guide(*parts, guidance_scale)
                else:
                    prediction[frames] = guide(
                        parts[0], parts[2], guidance_scale, parts[1], flow_guidance_scale
                    )
            return prediction

        with self.progress_bar(total=num_inference_steps) as progress:

            def on_step(number: int, latents: Tensor) -> None:
                progress.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(number, latents)

            latents = sample(
                denoise,
                self.scheduler,
                noise,
                num_inference_steps,
                generator,
                noise_sharing,
                noise_share,
                on_step,
            )
        result = self._output(latents, (height, width), output_type, chunk_size)
        self.maybe_free_model_hooks()
        return FlowToVideoOutput(frames=result)

    @property
    def sampling(self) -> SamplingConfig:
        """What the checkpoint recommends; without an `s2dm_config`, what the paper does."""
        settings = self.config.get("s2dm_config") or {}
        return SamplingConfig.from_dict(settings.get("sampling", {}))

    def _sampling(
        self,
        steps: int | None,
        guidance_scale: float | None,
        flow_guidance_scale: float | None,
        flow_start: float | None,
    ) -> tuple[int, float, float | None, float]:
        """What is asked for, and what the checkpoint recommends where that is None."""
        recommended = self.sampling
        if steps is None:
            steps = recommended.steps
        if guidance_scale is None:
            guidance_scale = recommended.guidance_scale
        if flow_guidance_scale is None:
            flow_guidance_scale = recommended.flow_guidance_scale
        if flow_start is None:
            flow_start = recommended.flow_start
        if not 0 <= flow_start <= 1:
            raise ValueError(f"Expected flow_start from 0 to 1, got {flow_start}.")
        return steps, guidance_scale, flow_guidance_scale, flow_start

    @property
    def vae_factor(self) -> int:
        """Pixels along each side of one latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels that is generated for a clip of this size, in whole latent cells."""
        factor = self.vae_factor
        return -(-height // factor) * factor, -(-width // factor) * factor

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
    def encode_flow(self, flow: FlowField) -> Tensor:
        """Encode a flow field to tokens (N, tokens, width)."""
        # At the size that the encoder works in, as in training: another way of getting there
        # gives edges that the encoder has never seen.
        condition = flow.condition(*self.flow_adapter.adapter.encoder.size)
        weights = next(self.flow_adapter.parameters())
        return torch.cat([self.flow_adapter(part.to(weights)) for part in condition.split(16)])

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
        guidance_scale: float,
        flow_guidance_scale: float | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Text (1, L, d) and flow tokens (N, tokens, width) of each prediction that is needed."""
        conditional = (self.encode_prompt(prompt), self.encode_flow(flow))
        if guidance_scale == 1 and flow_guidance_scale in (None, 1):
            return [conditional]
        negative = self.encode_prompt(negative_prompt or "")
        texts = _same_length([conditional[0], negative])
        conditional, negative = (texts[0], conditional[1]), texts[1]
        unconditional = (negative, self._null_tokens(len(flow)))
        if flow_guidance_scale == 1:  # the prediction under null labels has no weight
            return [(negative, conditional[1]), conditional]
        if flow_guidance_scale is None:
            return [unconditional, conditional]
        return [unconditional, (negative, conditional[1]), conditional]

    def _null_tokens(self, frames: int) -> Tensor:
        return self.flow_adapter.adapter.null_tokens(frames).detach()

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        labels: list[tuple[Tensor, Tensor]],
        frames: Tensor,
    ) -> list[Tensor]:
        """ε_θ of the same frames under each of the labels, as one batch, in float32."""
        text = torch.cat([text.expand(len(frames), -1, -1) for text, _ in labels])
        tokens = torch.cat([tokens[frames] for _, tokens in labels])
        prediction = self.unet(
            latents.to(self.unet.dtype).repeat(len(labels), 1, 1, 1),
            timestep,
            encoder_hidden_states=text,
            cross_attention_kwargs={"flow_tokens": tokens},
        ).sample
        return list(prediction.to(latents.dtype).chunk(len(labels)))


def _only(config: S2DMConfig, parts: Iterable[str]) -> S2DMConfig:
    """The config of a file that holds none but these parts."""
    return dataclasses.replace(config, **{part: None for part in PARTS if part not in parts})


def _on_canvas(flow: FlowField, size: tuple[int, int], canvas: tuple[int, int]) -> FlowField:
    """The field of a picture of `size` as a part of a larger canvas, at its top left.

    What is added to the right and below moves as the border does.
    """
    if size == canvas:
        return flow  # of any size: its condition doesn't depend on it
    flow = flow.resize(*size)
    margin = (0, canvas[1] - size[1], 0, canvas[0] - size[0])
    return FlowField(
        F.pad(flow.displacement, margin, mode="replicate"),
        F.pad(flow.occlusion, margin, mode="replicate"),
    )


def _same_length(texts: list[Tensor]) -> list[Tensor]:
    """Repeat shorter prompts whole; attention over repeated tokens is what it was before."""
    import math

    length = math.lcm(*(text.shape[1] for text in texts))
    return [text.repeat(1, length // text.shape[1], 1) for text in texts]


def _to_pil(frames: Tensor) -> list[Any]:
    from PIL import Image

    from ..video import to_uint8

    return [Image.fromarray(to_uint8(frame)) for frame in frames]
