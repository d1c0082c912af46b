"""Our networks as diffusers models, so that pipelines can save, load and move them.

The networks themselves must not depend on diffusers, because the ComfyUI nodes use them too; hence
these thin wrappers.
"""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..flow import FlowField
from ..models import (
    BertConfig,
    FlowAdapter,
    FlowAdapterConfig,
    FlowGenerator,
    FlowGeneratorConfig,
    LFDMConditions,
    RegionMotionConfig,
)


class FlowAdapterModel(ModelMixin, ConfigMixin):
    """A `FlowAdapter` with `save_pretrained` and `from_pretrained`.

    Args:
        settings: a `FlowAdapterConfig` as a dictionary.
    """

    @register_to_config
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.adapter = FlowAdapter(FlowAdapterConfig.from_dict(settings))

    @classmethod
    def wrap(cls, adapter: FlowAdapter) -> FlowAdapterModel:
        """Wrap an adapter that exists; its weights are shared, not copied."""
        model = cls(adapter.config.to_dict())
        model.adapter = adapter
        return model

    def forward(self, field: FlowField, size: tuple[int, int]) -> Tensor:
        """Encode a flow field to tokens (N, tokens, width), for latents of (height, width)."""
        return self.adapter.tokens(field, size)


class FlowGeneratorModel(ModelMixin, ConfigMixin):
    """A `FlowGenerator` with `save_pretrained` and `from_pretrained`.

    Args:
        settings: a `FlowGeneratorConfig` as a dictionary.
    """

    @register_to_config
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.network = FlowGenerator(FlowGeneratorConfig.from_dict(settings))

    @classmethod
    def wrap(cls, network: FlowGenerator) -> FlowGeneratorModel:
        """Wrap a network that exists; its weights are shared, not copied."""
        model = cls(network.config.to_dict())
        model.network = network
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `FlowGenerator.forward`."""
        return self.network(*args, **kwargs)


class LFDMConditionsModel(ModelMixin, ConfigMixin):
    """`LFDMConditions` with `save_pretrained` and `from_pretrained`.

    Args:
        regions: a `RegionMotionConfig` as a dictionary.
        encoder: a `BertConfig` as a dictionary.
        tokenizer: of the encoder.
    """

    @register_to_config
    def __init__(
        self, regions: dict[str, Any], encoder: dict[str, Any], tokenizer: dict[str, Any]
    ) -> None:
        super().__init__()
        self.module = LFDMConditions(
            RegionMotionConfig.from_dict(regions), BertConfig.from_dict(encoder), tokenizer
        )

    @classmethod
    def wrap(cls, module: LFDMConditions, encoder: BertConfig) -> LFDMConditionsModel:
        """Wrap a module that exists; its weights are shared, not copied."""
        regions = module.region_motion.config
        model = cls(regions.to_dict(), encoder.to_dict(), dict(module.tokenizer))
        model.module = module
        return model

    def forward(self, picture: Tensor) -> Tensor:
        """As `LFDMConditions.reference`."""
        return self.module.reference(picture)
