"""A checkpoint of any size as ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any, NamedTuple

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.model_base import ModelType

from ...s2dm.models import (
    LATENT_CELL,
    STAGE_1,
    STAGE_2,
    Checkpoint,
    CheckpointError,
    LFDMConditions,
    RegionMotion,
    S2DMConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    check_reference,
    lfdm_conditions,
    load_checkpoint,
    unknown_words,
    unknown_words_message,
)
from ...s2dm.models.checkpoint import Part, State
from ...s2dm.models.tokenizer import write_tokenizer
from .adapter import apply_adapter
from .compat import is_dynamic, load_weights, make_clip, patcher_class
from .notices import Notice
from .parts import CheckedVAE
from .previews import fit_preview
from .saving import keep_when_saving
from .stage1 import MODEL_TYPES, Stage1, embed, load_conditions, load_network, load_regions

# Core calls by "linear" what others call "scaled_linear": linear in the root of beta.
_BETA_SCHEDULES = {"scaled_linear": "linear"}


class Loaded(NamedTuple):
    """What `load_all` gives: core's objects, the adapter on the model, stage 1 if it is there."""

    config: S2DMConfig
    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    stage1: Stage1 | None


def load_all(path: str, chunk_size: int = 0) -> Loaded:
    """Load a checkpoint of stage 2, and stage 1 with it where the file holds it.

    Args:
        path: of the file.
        chunk_size: frames that the U-Net sees at a time; 0 chooses from free memory.

    Raises:
        CheckpointError: the file is broken, or a part is missing or not for ComfyUI.
    """
    checkpoint = load_checkpoint(path, STAGE_2, optional=STAGE_1)
    config = checkpoint.config
    if config.vae.factor != LATENT_CELL or config.vae.latent_channels != config.unet.in_channels:
        raise CheckpointError(
            f"vae: expected {config.unet.in_channels} latent channels of {LATENT_CELL} pixels "
            f"a side, got {config.vae.latent_channels} of {config.vae.factor}. ComfyUI can't "
            "sample such latents."
        )
    model = load_model(checkpoint)
    if model.model.device != torch.device("cpu") and not is_dynamic(model):
        # As core does with a model that it made on the GPU; its memory isn't counted otherwise.
        comfy.model_management.load_models_gpu([model], force_full_load=True)
    # Newer versions of core reload the model in this way, for hooks and for further GPUs.
    model.cached_patcher_init = (_reload_model, (path,))
    vae = load_vae(*checkpoint["vae"])
    fit_preview(model.model.latent_format, config.vae, vae)
    model = apply_adapter(
        model,
        *checkpoint["flow_adapter"],
        chunk_size=chunk_size,
        sampling=config.sampling,
    )
    clip = load_clip(checkpoint["text_encoder"], config.tokenizer)
    stage1 = _stage1(checkpoint, clip, vae)
    keep_when_saving(model, config, stage1=stage1 and stage1.networks())
    return Loaded(config, model, clip, vae, stage1)


def _stage1(checkpoint: Checkpoint, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> Stage1 | None:
    if "flow_generator" not in checkpoint:
        return None
    config, state = checkpoint["flow_generator"]
    if (conditions := lfdm_conditions(checkpoint)) is not None:
        return _lfdm(checkpoint, conditions)
    check_reference(config, checkpoint["vae"].config.latent_channels, "the VAE's latents")
    return Stage1(checkpoint.config, load_network(config, state), clip, vae)


def _lfdm(checkpoint: Checkpoint, conditions: LFDMConditions) -> Stage1:
    network = load_network(*checkpoint["flow_generator"])
    return Stage1(checkpoint.config, network, conditions=load_conditions(conditions))


def load_flow_models(path: str) -> tuple[comfy.model_patcher.ModelPatcher, Stage1 | None]:
    """A region-motion model, and LFDM's flow generator where the file holds it.

    Raises:
        CheckpointError: the file is broken, or there is no region-motion model.
    """
    others = ("flow_generator", "flow_text_encoder")
    checkpoint = load_checkpoint(path, ("region_motion",), optional=others)
    config, state = checkpoint["region_motion"]
    model = RegionMotion(config)
    model.load_state_dict(dict(state))
    regions = load_regions(model.eval().requires_grad_(False))
    if "flow_generator" not in checkpoint:
        return regions, None
    conditions = lfdm_conditions(checkpoint)
    return regions, None if conditions is None else _lfdm(checkpoint, conditions)


def load_flow_generator(path: str, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> Stage1:
    """The flow generator of a file, with the CLIP and VAE that it was trained on.

    Raises:
        CheckpointError: the file is broken, there is no flow generator, or it is LFDM's.
        ValueError: it was trained on another CLIP or VAE.
    """
    checkpoint = load_checkpoint(path, ("flow_generator",))
    config, state = checkpoint["flow_generator"]
    if config.flow == "positions":
        raise CheckpointError(
            "expected a flow generator that reads CLIP and VAE, got LFDM's, which comes with what "
            "it reads. Use Load Region Motion (S2DM)."
        )
    check_reference(config, vae.latent_channels, "the VAE's latents")
    width = embed(clip, "").shape[-1]
    if width != config.text_dim:
        raise ValueError(
            f"expected a CLIP whose prompts have width {config.text_dim}, got one of width "
            f"{width}. Connect the CLIP that the flow generator was trained with."
        )
    channels = VAEConfig(latent_channels=vae.latent_channels, scaling_factor=latent_scale(vae))
    whole = dataclasses.replace(checkpoint.config, vae=channels)
    return Stage1(whole, load_network(config, state), clip, vae)


def latent_scale(vae: comfy.sd.VAE) -> float:
    """What stage 1 multiplies a VAE's latents with: Stable Diffusion's, unless it is one of ours.

    Core keeps this number with the MODEL, which stage 1 has no need of.
    """
    return vae.scaling_factor if isinstance(vae, CheckedVAE) else VAEConfig().scaling_factor


def load_model(
    checkpoint: Checkpoint, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The U-Net as a MODEL in the types and on the devices that core chooses.

    Args:
        checkpoint: with U-Net and VAE, which says the scale of the latents.
        disable_dynamic: use core's plain patcher even where there is a dynamic one.
    """
    management = comfy.model_management
    unet, state = checkpoint["unet"]
    model_config = _ModelConfig(unet, checkpoint["vae"].config, checkpoint.config.schedule)
    parameters = comfy.utils.calculate_parameters(state)
    weight_dtype = comfy.utils.weight_dtype(state)
    load_device = management.get_torch_device()
    supported = model_config.supported_inference_dtypes
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=weight_dtype
    )
    model_config.set_inference_dtype(
        dtype, management.unet_manual_cast(dtype, load_device, supported)
    )
    model = model_config.get_model(
        state, device=management.unet_inital_load_device(parameters, dtype)
    )
    patcher = patcher_class(not disable_dynamic)(
        model, load_device=load_device, offload_device=management.unet_offload_device()
    )
    load_weights(patcher, dict(state))
    return patcher


def _reload_model(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_model(load_checkpoint(path, parts=("unet", "vae")), disable_dynamic)


class _ModelConfig(comfy.supported_models.SD15):
    """Core's Stable Diffusion 1.5 in the sizes and with the schedule of a checkpoint."""

    def __init__(self, unet: UNetConfig, vae: VAEConfig, schedule: ScheduleConfig) -> None:
        super().__init__(_unet_config(unet))
        self.unet_config["num_heads"] = unet.num_heads
        self.prediction_type = schedule.prediction_type
        self.latent_format = comfy.latent_formats.SD15(vae.scaling_factor)
        # Core then gives empty latents this many channels by itself.
        self.latent_format.latent_channels = vae.latent_channels
        if schedule.beta_schedule not in _BETA_SCHEDULES:
            raise CheckpointError(
                f"schedule: expected {' or '.join(_BETA_SCHEDULES)}, got "
                f"'{schedule.beta_schedule}', which ComfyUI doesn't have."
            )
        self.sampling_settings = {
            "beta_schedule": _BETA_SCHEDULES[schedule.beta_schedule],
            "linear_start": schedule.beta_start,
            "linear_end": schedule.beta_end,
            "timesteps": schedule.steps,
        }

    def inpaint_model(self) -> bool:
        # Core takes every U-Net with more than four channels for one of inpainting.
        return False

    def model_type(self, state_dict: State, prefix: str = "") -> ModelType:
        return MODEL_TYPES[self.prediction_type]


def _unet_config(config: UNetConfig) -> dict[str, Any]:
    """The arguments of core's UNetModel, as core finds them in a file of Stable Diffusion."""
    levels, count = config.attention_levels, config.num_res_blocks
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "model_channels": config.model_channels,
        "num_res_blocks": [count] * len(levels),
        "channel_mult": list(config.channel_mult),
        "transformer_depth": [int(level) for level in levels for _ in range(count)],
        "transformer_depth_output": [int(level) for level in levels for _ in range(count + 1)],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": config.context_dim,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


def load_clip(part: Part, tokenizer: dict[str, Any]) -> comfy.sd.CLIP:
    """The text encoder with its tokenizer as a CLIP."""
    config, state = part
    target = comfy.supported_models_base.ClipTarget(
        _tokenizer_class(config, tokenizer), comfy.sd1_clip.SD1ClipModel
    )
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_length,
        "eos_token_id": config.eos_token_id,
    }
    weights = {f"clip_l.transformer.{name}": weight for name, weight in state.items()}
    # Stable Diffusion 1.x doesn't use the projection; core has one and would leave it empty.
    projection = "clip_l.transformer.text_projection.weight"
    weights[projection] = torch.eye(config.hidden_size)
    arguments = {
        "embedding_directory": folder_paths.get_folder_paths("embeddings"),
        "parameters": comfy.utils.calculate_parameters(weights),
        "model_options": {"clip_l_model_config": sizes, "clip_l_class": _clip_class(config)},
    }
    return make_clip(target, weights, **arguments)


def _clip_class(config: TextEncoderConfig) -> type[comfy.sd1_clip.SDClipModel]:
    class FlowClipModel(comfy.sd1_clip.SDClipModel):
        """Core's CLIP text model with a vocabulary of any size."""

        def __init__(
            self,
            device: str | torch.device = "cpu",
            dtype: torch.dtype | None = None,
            model_options: dict[str, Any] | None = None,
        ) -> None:
            end = config.eos_token_id
            super().__init__(
                device=device,
                max_length=config.max_length,
                dtype=dtype,
                special_tokens={"start": config.bos_token_id, "end": end, "pad": end},
                return_projected_pooled=False,
                model_options=model_options or {},
            )
            embeddings = self.transformer.text_model.embeddings
            embeddings.token_embedding = self.operations.Embedding(
                config.vocab_size, config.hidden_size, dtype=dtype, device=device
            )
            self.freeze()

    return FlowClipModel


def _tokenizer_class(config: TextEncoderConfig, tokenizer: dict[str, Any]) -> type:
    if tokenizer["kind"] == "clip":
        return comfy.sd1_clip.SD1Tokenizer
    notice = Notice("All words of the prompt are known.")

    class FlowSDTokenizer(comfy.sd1_clip.SDTokenizer):
        """Core's tokenizer with the words of the checkpoint."""

        def __init__(
            self,
            embedding_directory: list[str] | None = None,
            tokenizer_data: dict[str, Any] | None = None,
        ) -> None:
            with tempfile.TemporaryDirectory() as folder:
                write_tokenizer(tokenizer, folder)
                super().__init__(
                    folder,
                    max_length=config.max_length,
                    embedding_directory=embedding_directory,
                    embedding_size=config.hidden_size,
                    tokenizer_data=tokenizer_data or {},
                )

        def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> list[Any]:
            words = unknown_words(text, tokenizer)
            notice.tell(unknown_words_message(words) if words else "")
            return super().tokenize_with_weights(text, *args, **kwargs)

    class FlowTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(
            self,
            embedding_directory: list[str] | None = None,
            tokenizer_data: dict[str, Any] | None = None,
        ) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=FlowSDTokenizer)

    return FlowTokenizer


def load_vae(config: VAEConfig, state: State) -> comfy.sd.VAE:
    """The autoencoder as a VAE."""
    details = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": details, "embed_dim": config.latent_channels}
    vae = CheckedVAE(sd=dict(state), config={"params": params})
    # Core knows these only of the autoencoders that it recognises by their weights.
    vae.latent_channels = config.latent_channels
    vae.downscale_ratio = vae.upscale_ratio = config.factor
    vae.scaling_factor = config.scaling_factor
    return vae
