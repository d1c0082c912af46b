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
from ..models import FlowAdapter, FlowAdapterConfig, FlowGenerator, FlowGeneratorConfig


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
