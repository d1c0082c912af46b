"""The adversarial loss of the autoencoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2dm.training.adversarial import LEAST_PIXELS, AdversarialLoss, PatchDiscriminator


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return nn.Conv2d(4, 3, 3, padding=1)


@pytest.fixture
def target():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def losses_of(loss, decoder, target, steps=0):
    latents = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    output = decoder(latents)
    reconstruction = (output - target).abs().mean()
    steps = torch.tensor(steps)
    return reconstruction, loss(output, target, reconstruction, decoder.weight, steps)


@pytest.mark.parametrize(("size", "cells"), [(LEAST_PIXELS, 1), (32, 6), (64, 14)])
def test_there_is_a_logit_for_every_patch(size, cells):
    assert PatchDiscriminator(8)(torch.zeros(2, 3, size, size)).shape == (2, 1, cells, cells)


def test_a_patch_is_34_pixels_wide():
    # Group normalisation sees the whole picture: without it, what one logit hangs on.
    layers = [m for m in PatchDiscriminator(8).layers if not isinstance(m, nn.GroupNorm)]
    pictures = torch.zeros(1, 3, 64, 64, requires_grad=True)
    nn.Sequential(*layers)(pictures)[0, 0, 7, 7].backward()
    seen = pictures.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [34, 34]


def test_each_loss_is_for_one_of_the_two(decoder, target):
    loss = AdversarialLoss(0.5, warmup_steps=0)
    judge = list(loss.discriminator.parameters())
    _, losses = losses_of(loss, decoder, target)
    own = torch.autograd.grad(
        losses["fooling"], [decoder.weight, *judge], retain_graph=True, allow_unused=True
    )
    assert own[0].norm() > 0 and all(gradient is None for gradient in own[1:])
    own = torch.autograd.grad(losses["judging"], [decoder.weight, *judge], allow_unused=True)
    assert own[0] is None and all(gradient is not None for gradient in own[1:])
    assert sum(gradient.norm() for gradient in own[1:]) > 0


def test_its_gradient_is_a_share_of_the_other_loss_after_warming_up(decoder, target):
    loss = AdversarialLoss(0.5, warmup_steps=2)
    shares = []
    for steps in range(4):
        reconstruction, losses = losses_of(loss, decoder, target, steps)
        norms = [
            torch.autograd.grad(value, decoder.weight, retain_graph=True)[0].norm()
            for value in (losses["fooling"], reconstruction)
        ]
        shares.append(float(norms[0] / norms[1]))
    assert shares == pytest.approx([0, 0, 0.5, 0.5], rel=1e-4)


def test_the_decoder_learns_to_be_taken_for_real(decoder, target):
    loss = AdversarialLoss(0.5, warmup_steps=0)
    latents = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    before = loss.discriminator(decoder(latents)).mean()
    _, losses = losses_of(loss, decoder, target)
    losses["fooling"].backward()
    with torch.no_grad():
        decoder.weight -= 0.01 * decoder.weight.grad / decoder.weight.grad.norm()
    assert loss.discriminator(decoder(latents)).mean() > before


def test_the_discriminator_learns_to_tell_blurred_pictures():
    torch.manual_seed(0)
    loss = AdversarialLoss(1.0, warmup_steps=0)
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), 1e-3)
    stripes = torch.ones(8, 3, 32, 32)
    stripes[..., ::2] = -1
    blurred = torch.nn.functional.avg_pool2d(stripes, 3, 1, 1)
    for _ in range(20):
        weight = torch.ones((), requires_grad=True)
        output = blurred * weight
        reconstruction = (output - stripes).abs().mean()
        loss(output, stripes, reconstruction, weight, torch.tensor(0))["judging"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.discriminator(stripes).mean() > loss.discriminator(blurred).mean() + 0.5
