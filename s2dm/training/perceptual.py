"""The loss of a picture by the features of VGG-19 (arXiv 1603.08155)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..settings import SettingsError

# Channels of the convolutions of each size, as far as they are needed, and in which place of
# torchvision's list relu1_1 to relu5_1 come.
_WIDTHS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,))
_LAYERS = (1, 6, 11, 20, 29)
_SCALES = 4
_WEIGHT = 10.0
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as VGG was trained


class PerceptualLoss(nn.Module):
    """Mean differences of five layers at four sizes, as LFDM trains its RegionMM.

    Args:
        weights: torchvision's `vgg19-….pth`, or the same as safetensors.

    Raises:
        SettingsError: the file holds something else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.layers = _layers()
        if weights.suffix == ".safetensors":
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        features = {
            name.removeprefix("features."): weight
            for name, weight in state.items()
            if name.startswith("features.")
        }
        expected = self.layers.state_dict()
        if any(
            name not in features or features[name].shape != w.shape for name, w in expected.items()
        ):
            raise SettingsError(f"vgg: expected torchvision's weights of VGG-19, got {weights}.")
        self.layers.load_state_dict({name: features[name] for name in expected})
        self.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] each; a scalar."""
        loss = output.new_zeros(())
        for scale in range(_SCALES):
            if scale:
                output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
            pairs = zip(self._features(output), self._features(target), strict=True)
            loss = loss + sum(_WEIGHT * (made - true.detach()).abs().mean() for made, true in pairs)
        return loss

    def _features(self, picture: Tensor) -> list[Tensor]:
        x, found = (picture - self.mean) / self.std, []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in _LAYERS:
                found.append(x)
        return found


def _layers() -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for number, widths in enumerate(_WIDTHS):
        if number:
            layers.append(nn.MaxPool2d(2))
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)
