"""The flow generator as a diffusers model, so that pipelines can save, load and move it."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..models import FlowGenerator, FlowGeneratorConfig


class FlowGeneratorModel(ModelMixin, ConfigMixin):
    """A `FlowGenerator` with `save_pretrained` and `from_pretrained`.

    As thin as `FlowAdapterModel`, and for the same reason.

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
