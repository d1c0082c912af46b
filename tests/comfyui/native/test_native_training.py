"""Training an adapter on core's model: frozen, exact, and the same as with the other engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def prepared(rig: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three clips of moving squares, prepared with the checkpoint's own VAE and CLIP."""
    import prepared_clips

    training = rig.module("nodes.native.training")
    files = rig.module("s2dm.data.prepared")
    flow = rig.module("s2dm.flow")
    data = rig.module("s2dm.data")

    def load(number: int) -> Any:
        clip = prepared_clips.moving_clip(number, frames=6, size=64)
        field = flow.FlowField(clip.flow.displacement, clip.flow.occlusion)
        return data.Clip(clip.frames, field, f"a man in a red shirt is walking {number}")

    sources = [files.Source(f"clip {n}", f"{n}", lambda n=n: load(n)) for n in range(3)]
    folder = tmp_path_factory.mktemp("prepared")
    with torch.inference_mode():
        encoders = training.encoders(rig.loaded.vae, rig.loaded.clip)
        files.prepare_clips(folder, sources, 3, encoders)
    return files.PreparedClips(folder)


class Run:
    """A run of the trainer on a MODEL, as the node makes it."""

    def __init__(
        self, rig: Any, model: Any, prepared: Any, folder: Path, fusion: str = "channel",
        checkpointing: bool = True, stir: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        training = rig.module("nodes.native.training")
        library = rig.module("s2dm.training.flow_adapter")
        values = {"steps": 3, "clips": 2, "frames": 3, "chunk": 2, "warmup_steps": 1, **settings}
        chosen = library.AdapterSettings(**values)
        with torch.inference_mode(), training.training_mode():
            sizes = {"width": 32, "hidden": 32}
            config = training.adapter_config_for(model, fusion, **sizes)
            adapter = library.new_adapter(config, chosen.seed)
            if stir:
                generator = torch.Generator().manual_seed(5)
                with torch.no_grad():
                    for weight in adapter.parameters():
                        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            with training.frozen(
                model, adapter, prepared, chosen.chunk, checkpointing=checkpointing
            ) as denoiser:
                self.trainer = library.AdapterTrainer(chosen, adapter, denoiser, prepared, folder)
                self.loss = self.trainer.accumulate(self.trainer.batch(0))
                self.gradient = torch.cat([p.grad.flatten() for p in adapter.parameters()])
                adapter.zero_grad()
                self.buffers = [p for p in model.model.parameters() if p.grad is not None]
                self.trainer.run()
                self.picture = training.preview(
                    self.trainer, model.get_model_object("latent_format")
                )


@pytest.fixture(scope="module")
def inference_model(rig: Any) -> Any:
    """A MODEL as the server loads one: in inference mode, which no gradient passes."""
    with torch.inference_mode():
        model = rig.plain_model()
    assert all(weight.is_inference() for weight in model.model.diffusion_model.parameters())
    return model


@pytest.mark.parametrize("fusion", ["channel", "token", "spatial", "channel+spatial"])
def test_it_trains_what_was_loaded_in_inference_mode_and_leaves_it_alone(
    rig: Any, inference_model: Any, prepared: Any, tmp_path: Path, fusion: str
) -> None:
    unet = inference_model.model.diffusion_model
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(1))

    def image() -> torch.Tensor:
        import comfy.model_management

        with torch.inference_mode():
            comfy.model_management.load_models_gpu([inference_model])
            return unet(x, torch.tensor([500.0, 500.0]), context=text)

    clean = image()
    run = Run(rig, inference_model, prepared, tmp_path, fusion)
    assert run.gradient.isfinite().all() and run.gradient.norm() > 0
    assert not run.buffers
    assert all(weight.grad is None for weight in unet.parameters())
    assert len(run.trainer.losses) == 3
    assert run.picture.shape[0] == 3 and run.picture.isfinite().all()
    after = unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(image(), clean)
    forwards = [
        m for m in unet.modules() if type(vars(m).get("forward")).__name__ == "_Checkpointed"
    ]
    assert not forwards


def test_chunks_and_checkpointing_change_no_gradient(
    rig: Any, inference_model: Any, prepared: Any, tmp_path: Path
) -> None:
    fusion = "channel+spatial"
    whole = Run(
        rig, inference_model, prepared, tmp_path / "a", fusion, False, stir=True, chunk=6
    ).gradient
    parts = Run(
        rig, inference_model, prepared, tmp_path / "b", fusion, True, stir=True, chunk=1
    ).gradient
    assert (whole - parts).norm() <= 1e-5 * whole.norm()


def test_a_model_that_holds_an_adapter_learns_as_one_without(
    rig: Any, inference_model: Any, prepared: Any, tmp_path: Path
) -> None:
    plain = Run(rig, inference_model, prepared, tmp_path / "a").trainer.losses
    assert Run(rig, rig.loaded.model, prepared, tmp_path / "b").trainer.losses == pytest.approx(
        plain, rel=1e-5
    )
