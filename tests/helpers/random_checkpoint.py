"""A checkpoint of random weights, for tests that ask whether things run, not how they look."""

from pathlib import Path

import torch

from s2dm.models import (
    PARTS,
    FlowAdapterConfig,
    FlowGeneratorConfig,
    S2DMConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    save_checkpoint,
    train_tokenizer,
    with_tokenizer,
)

UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(True, True),
    num_heads=2,
    context_dim=32,
)
TINY = S2DMConfig(
    unet=UNET,
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1),
    text_encoder=TextEncoderConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64),
    flow_adapter=FlowAdapterConfig.for_unet(UNET),
    flow_generator=FlowGeneratorConfig(
        reference_channels=4,
        text_dim=32,
        model_channels=16,
        channel_mult=(1, 2),
        num_heads=2,
        head_dim=8,
        norm_groups=4,
        norm="frame",
        upsample="nearest",
        null_reference="learned",
        null_text="learned",
        motion_strength=True,
        size=(16, 16),
        frames=4,
        displacement_scale=0.25,
        motion=0.02,
        schedule=ScheduleConfig(beta_schedule="cosine", prediction_type="v_prediction"),
        threshold=0.0,
    ),
    licence="none: random numbers",
)


def write_random_checkpoint(path: Path, config: S2DMConfig = TINY, seed: int = 0) -> Path:
    """Write random weights for `config`, scaled so that nothing grows without bound."""
    config = with_tokenizer(config, train_tokenizer(["a man in a red coat is squat"], 600))
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for name, part in PARTS.items():
        if getattr(config, name) is None:
            continue
        states[name] = {
            key.ldm: random_weight(key.ldm_shape, generator)
            for key in part.keys(getattr(config, name))
        }
    save_checkpoint(path, config, states)
    return path


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:  # a bias or a norm's scale: near one serves both
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    inputs = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) / inputs**0.5
