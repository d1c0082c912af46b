"""What core shows of latents while it samples, beside the frames that they decode to."""

from __future__ import annotations

import pytest
import torch
from comfyui_install import PACK

from s2dm.cli import DEFAULT_CHECKPOINT
from s2dm.flow.geometry import resample
from s2dm.video import read_clip

pytestmark = pytest.mark.comfyui

EXAMPLE = PACK / "workflows" / "s2dm_example.mp4"
FRAMES = [0, 5, 10, 15]


@pytest.fixture(scope="module")
def bundled(rig):
    return type(rig)(rig.pack, rig.nodes, DEFAULT_CHECKPOINT)


def shown(model, latents, monkeypatch):
    """(N,3,h,w): the pictures that core's own previewer makes of scaled latents."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    latent_format = model.get_model_object("latent_format")
    previewer = latent_preview.get_previewer(torch.device("cpu"), latent_format)
    pictures = []
    for latent in latent_format.process_in(latents):
        _, image, _ = previewer.decode_latent_to_preview_image("PNG", latent[None])
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pictures.append(data.view(image.height, image.width, 3).movedim(-1, 0) / 255)
    return torch.stack(pictures)


def test_previews_of_a_clip_look_like_its_frames(bundled, monkeypatch):
    frames, _ = read_clip(EXAMPLE)
    with torch.inference_mode():
        latents = bundled.loaded.vae.encode(frames[FRAMES].movedim(1, -1))
        decoded = bundled.loaded.vae.decode(latents).movedim(-1, 1)
    previews = shown(bundled.loaded.model, latents, monkeypatch)
    error = (previews - resample(decoded, *latents.shape[-2:])).abs().mean()
    assert error <= 0.05
    # Colours that the map would put outside are clipped: few, or it runs wild.
    assert ((previews == 0) | (previews == 1)).float().mean() < 0.05


def test_the_bundled_checkpoint_is_fitted_from_few_pixels(bundled, monkeypatch):
    """It is encoded at each load: no more than 16 pictures of 32x32."""
    seen = []

    class Counted:
        def encode(self, pictures):
            seen.append(pictures.shape[:3].numel())
            return bundled.loaded.vae.encode(pictures)

    from comfy.latent_formats import SD15

    fit_preview = bundled.module("nodes.native.previews").fit_preview
    with torch.inference_mode():
        fit_preview(SD15(), bundled.loaded.config.vae, Counted())
    assert sum(seen) <= 16 * 32 * 32
