"""S2DM from a prompt alone, in two stages (paper, section 3.4)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..flow import FlowField
from ..models import (
    STAGE_1,
    STAGE_2,
    Checkpoint,
    CheckpointError,
    FlowSampling,
    SamplingConfig,
    check_reference,
    decode_flow,
    lfdm_conditions,
    load_checkpoint,
)
from ..sector import SHARED, NoiseSharing, seed_of_flow
from .flow_generation import embed_prompts, flow_scheduler, generate_flow
from .flow_to_video import FlowToVideoPipeline
from .modules import build
from .pictures import on_canvas, picture_of
from .request import Request
from .wrapped import FlowAdapterModel, FlowGeneratorModel, LFDMConditionsModel

_WITHOUT_STAGE_1 = (
    "expected the part flow_generator (stage 1, which makes flow from the prompt), got stage 2 "
    "alone. Choose a checkpoint with both, or give the motion of a clip: FlowToVideoPipeline, "
    "s2dm generate --clip."
)


@dataclass
class TextToVideoOutput(BaseOutput):
    """What the pipeline returns.

    frames: (N, 3, H, W) float32 in [0, 1] for "pt", a list of PIL images for "pil", latents
        (N, C, h, w) for "latent".
    flow: what stage 1 made, as the clip was asked to follow it: N frames of H x W pixels.
    reference: the frame that stage 1 started from, in the form of one of `frames`.
    """

    frames: Tensor | list[Any]
    flow: FlowField
    reference: Tensor | Any


class TextToVideoPipeline(FlowToVideoPipeline):
    """Text to video: reference frame, then flow, then the clip.

    1. ε_θ makes the reference frame from noise ν, with the prompt and zero flow.
    2. ε_φ, the flow generator, makes a sequence of flows from the prompt and that frame.
    3. ε_θ makes the clip from **the same ν**, with the prompt and that flow. Its first frame has
       zero flow, so it comes out as the reference frame, which the flow was made for.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, flow_adapter, s2dm_config: as in
            `FlowToVideoPipeline`.
        flow_generator: ε_φ; its reference features are the VAE's latents, and it reads the
            prompt by the text encoder.
        flow_conditions: for LFDM's flow generator, which has encoders of its own for both.

    Raises:
        CheckpointError: there is no flow generator, or LFDM's without its encoders.
        ValueError: the flow generator was made for other features than it would get.
    """

    # Called below its wrapper, past the hooks that would bring it to the device.
    _exclude_from_cpu_offload = ["flow_adapter", "flow_generator", "flow_conditions"]  # noqa: RUF012
    # The flow generator is not, but only so does a folder without it get as far as our message.
    _optional_components = ["flow_generator", "flow_conditions"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        flow_adapter: FlowAdapterModel,
        flow_generator: FlowGeneratorModel,
        flow_conditions: LFDMConditionsModel | None = None,
        s2dm_config: dict[str, Any] | None = None,
    ) -> None:
        if flow_generator is None:
            raise CheckpointError(f"Text to video: {_WITHOUT_STAGE_1}")
        network = flow_generator.network.config
        if flow_conditions is not None:
            regions = flow_conditions.module.region_motion.config
            check_reference(network, regions.feature_channels, "the region-motion model's features")
        elif network.flow == "positions":
            raise CheckpointError(
                "Text to video: expected flow_conditions beside LFDM's flow generator, got none. "
                "Load a checkpoint that holds region_motion and flow_text_encoder."
            )
        else:
            check_reference(network, vae.config.latent_channels, "the VAE's latents")
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, flow_adapter, s2dm_config)
        self.register_modules(flow_generator=flow_generator, flow_conditions=flow_conditions)

    # ------------------------------------------------------------------ files

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], torch_dtype: torch.dtype = torch.float32
    ) -> TextToVideoPipeline:
        """Build the pipeline from an S2DM checkpoint that holds both stages.

        Args, raises: as `FlowToVideoPipeline.from_single_file`.
        """
        checkpoint = load_checkpoint(path, STAGE_2, optional=STAGE_1)
        if "flow_generator" not in checkpoint:
            raise CheckpointError(f"{os.path.basename(path)}: {_WITHOUT_STAGE_1}")
        return cls.from_checkpoint(checkpoint, torch_dtype)

    @classmethod
    def _build(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        conditions = lfdm_conditions(checkpoint)
        network = build(checkpoint, "flow_generator")
        modules = super()._build(checkpoint) | {"flow_generator": FlowGeneratorModel.wrap(network)}
        if conditions is not None:
            encoder = checkpoint["flow_text_encoder"].config
            modules["flow_conditions"] = LFDMConditionsModel.wrap(conditions, encoder)
        return modules

    def _modules_by_part(self) -> dict[str, torch.nn.Module]:
        modules = super()._modules_by_part() | {"flow_generator": self.flow_generator.network}
        if self.flow_conditions is not None:
            module = self.flow_conditions.module
            modules["region_motion"] = module.region_motion
            modules["flow_text_encoder"] = module.text_encoder
        return modules

    # --------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_frames: int | None = None,
        negative_prompt: str | None = "",
        height: int | None = None,
        width: int | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        flow_sampling: FlowSampling = FlowSampling(),  # noqa: B008 (frozen)
        reference: Any | None = None,
        seed: int | None = None,
        noise_sharing: NoiseSharing = SHARED,
        chunk_size: int = 8,
        output_type: str = "pt",
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
    ) -> TextToVideoOutput:
        """Generate a clip from a prompt.

        Args:
            prompt: what the clip shows and what happens in it. Stage 1 reads its first 77
                tokens. A blank prompt is allowed, and gives a clip of anything: stage 1 then has
                its null label.
            num_frames: from 1 to `MAX_FRAMES`; as many as stage 1 was trained with if None. Stage 1
                makes that many in any case, and its flow is retimed, see `FlowField.retime`.
            negative_prompt: of stage 2. Stage 1 has a null label of its own.
            height, width: pixels of the clip; those of the checkpoint if None.
            sampling: of stage 2, see `FlowToVideoPipeline`.
            flow_sampling: of stage 1.
            reference: a picture of yours for stage 1 to start from, in place of the one that it
                would get from ν: a PIL image, or (3, H, W) in [0, 1]. It is scaled to cover the
                clip and cropped at the centre. It becomes frame 1 where the sampling is anchored;
                else **stage 1 alone sees it**: a picture has no ν from which stage 2 could start,
                so the clip shows the prompt as ν has it, moving as your picture would. Let the
                prompt describe the picture.
            seed: of ν, of the step noise, and (through a seed drawn from it) of stage 1; random
                if None.
            noise_sharing: as in `FlowToVideoPipeline`. Frame 1 is the reference frame with
                "shared" noise, the paper's; "mixed" noise and stochastic samplers
                with unshared noise make it another.
            chunk_size: how many frames of the clip stage 2 sees at a time. The flow does not
                depend on it, the clip only in rounding.
            output_type: "pt", "pil" or "latent".
            callback_on_step_end: called after each step with its number, counted from 0 through
                reference frame, flow and clip, and what is denoised there: latents
                (1, C, h, w), flow (1, N, 3, h, w), latents (N, C, h, w). May raise to stop.

        Returns:
            `TextToVideoOutput`

        Raises:
            ValueError: an argument is out of its range, or not what it should be.
        """
        config = self.flow_generator.network.config
        num_frames = config.frames if num_frames is None else num_frames
        request = Request(
            prompt,
            negative_prompt,
            self._size(height, width),
            self._sampling(sampling),
            torch.Generator().seed() if seed is None else seed,
            noise_sharing,
            chunk_size,
            output_type,
            callback_on_step_end,
        )
        flow_sampling.check(config, num_frames)
        size = request.size
        picture = None
        if reference is not None:
            picture = on_canvas(picture_of(reference, *size), self.vae_factor)
        # The reference frame and the clip have one seed, so they draw the same ν: `NoiseSharing`.
        still = FlowField.zeros(1, *size)
        latents = self._denoise(request, still) if picture is None else self._encode(picture)
        flow = self._generate_flow(request, latents, picture, flow_sampling)
        flow = flow.crop(*size).retime(num_frames)
        anchor = None
        if request.sampling.anchor_end and num_frames > 1:
            picture = self.decode_latents(latents) if picture is None else picture
            anchor = self._anchor(request, picture, flow)
        clip = self._output(request, self._denoise(request, flow, anchor))
        start = self._output(request, latents)[0]
        self.maybe_free_model_hooks()
        return TextToVideoOutput(frames=clip, flow=flow, reference=start)

    def _generate_flow(
        self,
        request: Request,
        latents: Tensor,
        picture: Tensor | None,
        sampling: FlowSampling,
    ) -> FlowField:
        """Stage 1: from latents (1, C, h, w) to as many flows as it was trained with, 8 h x 8 w.

        LFDM's sees the picture (1, 3, 8 h, 8 w) that they show, decoded if there is none.
        """
        network = self.flow_generator.network
        text, still, device = None, None, self._execution_device  # the null label
        if self.flow_conditions is not None:
            conditions = self.flow_conditions.module.to(device)
            picture = self.decode_latents(latents) if picture is None else picture
            text, reference = conditions.text(request.prompt), conditions.reference(picture)
            still = conditions.still(picture)
        else:
            reference = latents
            if request.prompt.strip():
                text = embed_prompts(self.text_encoder, self.tokenizer, [request.prompt], device)
        with self.progress_bar(total=sampling.steps) as progress:

            def on_flow_step(_: int, state: Tensor) -> None:
                progress.update()
                request.step_done(state)

            sample = generate_flow(
                network,
                flow_scheduler(network.config.schedule, sampling.sampler),
                text,
                reference,
                sampling.steps,
                sampling.guidance_scale,
                torch.Generator().manual_seed(seed_of_flow(request.seed)),
                sampling.motion(network.config),
                on_flow_step,
            )
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        return decode_flow(sample[0].cpu(), network.config, height, width, still)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, or that of the checkpoint."""
        settings = self.config.get("s2dm_config")
        if settings is None and None in (height, width):
            raise ValueError(
                "Expected height and width, got none, and the pipeline has no s2dm_config that "
                "would say the size it was trained with. Give both."
            )
        if settings is not None:
            trained = settings["resolution"]
            height, width = height or trained[0], width or trained[1]
        if height < 1 or width < 1:
            raise ValueError(f"Expected a size of at least 1x1 pixels, got {width}x{height}.")
        return height, width


def open_pipeline(
    path: str | os.PathLike[str], torch_dtype: torch.dtype = torch.float32, **options: Any
) -> FlowToVideoPipeline:
    """The pipeline of a checkpoint, a file or a folder: of both stages where it holds both.

    Args:
        path: a `.safetensors` file, or a folder that `save_pretrained` wrote.
        torch_dtype: type of the weights in memory.
        options: for `from_pretrained` of a folder.

    Raises:
        CheckpointError: the file is broken or lacks a part of stage 2, or the folder is no
            diffusers folder.
    """
    path = Path(path)
    if not path.is_dir():
        checkpoint = load_checkpoint(path, STAGE_2, optional=STAGE_1)
        kind = TextToVideoPipeline if "flow_generator" in checkpoint else FlowToVideoPipeline
        return kind.from_checkpoint(checkpoint, torch_dtype)
    kind = TextToVideoPipeline if "flow_generator" in read_index(path) else FlowToVideoPipeline
    return kind.from_pretrained(path, torch_dtype=torch_dtype, **options)


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder of diffusers says that it holds; CheckpointError if it is none."""
    index = folder / "model_index.json"
    try:
        content = json.loads(index.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no diffusers folder: it has no {index.name}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} could not be read ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{index}: expected a dictionary, got {type(content).__name__}.")
    return content
