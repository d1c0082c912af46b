"""The adversarial loss of the autoencoder: outlines that the mean of all possible ones would blur.

A discriminator of patches learns to tell reconstructions from pictures, and the decoder to be
taken for one (VQGAN, arXiv 2012.09841, section 3.1; the autoencoder of Stable Diffusion is trained
so, arXiv 2112.10752, appendix G).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

LEAST_PIXELS = 12
"""Height and width of the smallest picture that can be judged."""

_GROUPS = 8
_LARGEST = 1e4


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture, 34 pixels wide, how real it looks.

    pix2pix's (arXiv 1611.07004) with two halvings, and group for batch normalisation, so that
    pictures are judged one by one.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for width, stride in ((channels, 2), (2 * channels, 1)):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False),
                nn.GroupNorm(_GROUPS, 2 * width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * channels, 1, 4, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """(N,3,H,W) in [-1,1] to logits (N,1,H/4-2,W/4-2), above 0 for real."""
        return self.layers(pictures)


class AdversarialLoss(nn.Module):
    """The two losses of a decoder and its discriminator, as one that both can descend.

    For the first `warmup_steps` the discriminator learns alone. Against one that knows nothing
    the decoder would win at once, and neither would learn anything.
    """

    def __init__(self, weight: float, warmup_steps: int) -> None:
        super().__init__()
        self.weight = weight
        self.warmup_steps = warmup_steps
        self.discriminator = PatchDiscriminator()

    def forward(
        self, output: Tensor, target: Tensor, reconstruction: Tensor, last: Tensor, steps: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the decoder and of the discriminator, each with gradients for its own alone.

        Args:
            output, target: reconstructions and pictures, (N,3,H,W) in [-1,1].
            reconstruction: the loss beside it, a scalar.
            last: the weight of the decoder's last layer, where the two losses are brought to
                gradients of one size (VQGAN, Eq. 7), times `weight`.
            steps: how many have been trained, a scalar.
        """
        judge = self.discriminator
        fixed = {name: value.detach() for name, value in judge.state_dict(keep_vars=True).items()}
        fooling = -functional_call(judge, fixed, output).float().mean()
        real, false = judge(target).float(), judge(output.detach()).float()
        judging = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + false).mean())
        weight = self.weight * _balance(reconstruction, fooling, last)
        # Not read back from the device, which would wait for all that it has still to do.
        weight = weight * (steps >= self.warmup_steps)
        return {"fooling": weight * fooling, "judging": judging}


def _balance(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """By how much the gradient of `one` at a weight is larger than that of `other`."""
    (first,) = torch.autograd.grad(one, weight, retain_graph=True)
    (second,) = torch.autograd.grad(other, weight, retain_graph=True)
    return (first.norm() / second.norm().clamp_min(1e-6)).clamp(max=_LARGEST)
