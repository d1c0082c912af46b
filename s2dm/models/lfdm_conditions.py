"""What LFDM's flow generator is given: features of the reference frame, and the prompt by BERT.

Both engines call this one module; a flow generator of our own reads the VAE's latents and the
prompt by CLIP instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bert import build_bert, mean_state
from .checkpoint import Checkpoint, CheckpointError
from .config.networks import BertConfig
from .config.stage1 import RegionMotionConfig
from .flow_sampling import check_reference
from .region_motion import RegionMotion


class LFDMConditions(nn.Module):
    """LFDM's RegionMM and BERT.

    Args:
        regions, encoder: their sizes.
        tokenizer: of BERT, see `bert.py`.
    """

    def __init__(
        self, regions: RegionMotionConfig, encoder: BertConfig, tokenizer: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.region_motion = RegionMotion(regions)
        self.text_encoder = build_bert(encoder)

    @torch.no_grad()
    def reference(self, picture: Tensor) -> Tensor:
        """Features (1, C, h, w) of a picture (1, 3, H, W) in [0, 1], any size."""
        return self.region_motion.features(picture.to(self._weight))

    def still(self, picture: Tensor) -> Tensor:
        """Positions (2, h, w) that mean that nothing has moved since this picture."""
        return self.region_motion.still(picture.to(self._weight))[0].float().cpu()

    def text(self, prompt: str) -> Tensor | None:
        """The prompt's embedding (1, text_dim); None, the null label, if it is blank."""
        return mean_state(self.text_encoder, self.tokenizer, prompt) if prompt.strip() else None

    @property
    def _weight(self) -> Tensor:
        return self.region_motion.encoder.first.conv.weight


def lfdm_conditions(checkpoint: Checkpoint) -> LFDMConditions | None:
    """What the flow generator of this checkpoint is given; None if it is not LFDM's.

    Raises:
        CheckpointError: it is LFDM's, and the file lacks what it reads.
        ValueError: its features are of another region-motion model.
    """
    network = checkpoint["flow_generator"].config
    if network.flow != "positions":
        return None
    for part, command in (
        ("region_motion", "RegionMM_….pth"),
        ("flow_text_encoder", "bert-base-cased"),
    ):
        if part not in checkpoint:
            raise CheckpointError(
                f"flow generator: expected {part} beside LFDM's network, which reads frame and "
                f"prompt with its own encoders, got none. Join it: s2dm convert --with {command}."
            )
    (regions, region_state), (encoder, text_state) = (
        checkpoint["region_motion"],
        checkpoint["flow_text_encoder"],
    )
    check_reference(network, regions.feature_channels, "the region-motion model's features")
    module = LFDMConditions(regions, encoder, checkpoint.config.flow_tokenizer or {})
    module.region_motion.load_state_dict(dict(region_state))
    module.text_encoder.load_state_dict(dict(text_state))
    return module.eval().requires_grad_(False)
