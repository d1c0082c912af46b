"""Models in ComfyUI's own classes, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from full_size import fill_at_random


def random_model(config: Any, settings: dict[str, Any]) -> Any:
    """A MODEL of one of core's classes with random weights."""
    import comfy.model_patcher

    config = config({**settings})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, device, device)


def stable_diffusion(unet_config: dict[str, Any]) -> Any:
    """Stable Diffusion 1.x in its full size; `unet_config` as core's loader finds it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(unet_config)
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device="cpu")
    fill_at_random(model.diffusion_model)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, device, device)


def sdxl() -> Any:
    """Stable Diffusion XL: no layers at the finest level, several in a block at the coarsest."""
    import comfy.supported_models

    return random_model(
        comfy.supported_models.SDXL,
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1, 1],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 1, 2],
            "transformer_depth_output": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": 2,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "context_dim": 64,
            "num_head_channels": 16,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "legacy": False,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        },
    )
