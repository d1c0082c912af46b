"""A photo moved by core's own models of the sizes that people have, with random weights."""

from __future__ import annotations

import pytest
import torch
from compare import relative
from core_models import sdxl, stable_diffusion
from full_size import autoencoder, photo

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

FRAMES = 3


@pytest.mark.parametrize("kind", ["Stable Diffusion 1.5", "Stable Diffusion XL, narrow"])
def test_frame_1_is_the_photo_to_the_error_of_the_autoencoder_and_the_others_move(rig, kind):
    import comfy.sd

    torch.manual_seed(0)
    if kind.endswith("1.5"):
        config = rig.module("nodes.native.loading")._unet_config(
            rig.module("s2dm.models").SD15.unet
        )
        model, shape = stable_diffusion(config), (77, 768)
    else:
        model, shape = sdxl(), (7, 64)
    vae = comfy.sd.VAE(sd=autoencoder().state_dict())
    vae.throw_exception_if_invalid()
    flow = rig.equal_flow(FRAMES, height=128, width=128)
    for number in range(FRAMES):  # the whole picture slides to the right
        flow.displacement[number, 0] = -8.0 * number
        flow.occlusion[number, ..., : 8 * number] = 1
    picture = photo().movedim(0, -1)[None]
    (anchored,) = rig.run(
        "S2DMAnchorToReference", model=model, vae=vae, reference=picture, flow=flow
    )
    text = [[torch.randn(1, *shape), {"pooled_output": torch.zeros(1, 1280)}]]
    latent = {"samples": torch.zeros(FRAMES, 4, 16, 16)}
    samples = rig.sample((text, text, latent), anchored, cfg=1.0)
    with torch.inference_mode():
        clip, passed = vae.decode(samples), vae.decode(vae.encode(picture))[0]
    assert clip.shape == (FRAMES, 128, 128, 3) and clip.isfinite().all()
    assert passed.std() > 0.01  # not one grey
    assert (clip[0] - passed).abs().max() < 0.02
    assert relative(clip[-1], clip[0]) > 0.02
