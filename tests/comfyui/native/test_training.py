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


def gradient_of(*networks: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in torch.nn.ModuleList(networks).parameters()])


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
            config = training.trainable_config(model, fusion, **sizes)
            adapter = library.new_adapter(config, chosen.seed)
            lora = training.new_lora(model, chosen.lora_rank, chosen.seed)
            networks = [adapter] if lora is None else [adapter, lora]
            if stir:
                generator = torch.Generator().manual_seed(5)
                with torch.no_grad():
                    for weight in torch.nn.ModuleList(networks).parameters():
                        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            self.start = [
                {name: weight.clone() for name, weight in network.state_dict().items()}
                for network in networks
            ]
            with training.frozen(
                model, adapter, prepared, chosen.chunk, checkpointing=checkpointing, lora=lora
            ) as denoiser:
                self.trainer = library.AdapterTrainer(chosen, adapter, denoiser, prepared, folder)
                self.loss = self.trainer.accumulate(self.trainer.batch(0))
                self.gradient = gradient_of(*networks)
                torch.nn.ModuleList(networks).zero_grad()
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


def test_a_lora_learns_beside_the_adapter_and_core_loads_it(
    rig: Any, inference_model: Any, prepared: Any
) -> None:
    import comfy.sd
    import comfy.utils
    import folder_paths

    from nodes import LoraLoaderModelOnly

    unet = inference_model.model.diffusion_model
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    patched, listed, _ = train(
        rig, inference_model, prepared, "both", lora_rank=2, learning_rate=1e-2
    )
    after = unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None for weight in unet.parameters())
    name = "s2dm/both.safetensors"
    assert name in [file.replace("\\", "/") for file in folder_paths.get_filename_list("loras")]
    state = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", name))
    # to_q, to_k, to_v and to_out of two attentions in each of the five transformers
    layers = len(rig.module("nodes.native.training").new_lora(inference_model, 2, 0).names)
    assert layers % 8 == 0 and len(state) == 3 * layers
    assert all(weight.abs().max() > 0 for key, weight in state.items() if "lora_up" in key)

    encoded = rig.encode(rig.flow(2))
    with torch.inference_mode():
        (alone,) = LoraLoaderModelOnly().load_lora_model_only(inference_model, name, 1.0)
    (applied,) = rig.run("S2DMApplyFlowAdapter", model=alone, adapter=listed)
    (without,) = rig.run("S2DMApplyFlowAdapter", model=inference_model, adapter=listed)
    followed = rig.sample(encoded, patched)
    assert torch.allclose(followed, rig.sample(encoded, applied), atol=1e-5)
    assert (followed - rig.sample(encoded, without)).abs().max() > 1e-3


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


def train(rig: Any, model: Any, clips: Any, name: str, **inputs: Any) -> tuple[Any, ...]:
    """The node, with few steps."""
    values = {
        "steps": 3, "clips_per_step": 2, "frames_per_clip": 2, "frames_at_once": 2,
        "save_every": 2, "preview_every": 2, **inputs,
    }  # fmt: skip
    return rig.run("S2DMTrainFlowAdapter", model=model, clips=clips, name=name, **values)


@pytest.mark.parametrize("joining", ["channel", "spatial"])
def test_the_node_gives_a_model_that_follows_flow_by_the_adapter_it_lists(
    rig: Any, inference_model: Any, prepared: Any, joining: str
) -> None:
    name = f"mine {joining}"
    patched, listed, curve = train(
        rig, inference_model, prepared, name, joining=joining, learning_rate=1e-2
    )
    assert listed == f"{name}.safetensors"
    assert listed in rig.module("nodes.native.files").list_files()
    assert curve.ndim == 4 and curve.shape[-1] == 3
    config = rig.module("s2dm.models").read_config(
        rig.module("nodes.native.files").find_file(listed)
    )
    assert (config.adapter_training.clips, config.adapter_training.steps) == (3, 3)
    assert config.flow_adapter.fusion == joining
    encoded = rig.encode(rig.flow(2))
    (applied,) = rig.run("S2DMApplyFlowAdapter", model=inference_model, adapter=listed)
    followed = rig.sample(encoded, patched)
    assert torch.allclose(followed, rig.sample(encoded, applied))
    still = rig.sample(rig.encode(rig.equal_flow(2)), patched)
    assert (followed[1] - still[1]).abs().max() > 1e-4


def test_cancelled_it_keeps_what_was_learned_and_goes_on(
    rig: Any, inference_model: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    losses = rig.module("s2dm.training.run_folder").RunFolder
    import folder_paths

    def logged(name: str) -> list[float]:
        folder = Path(folder_paths.get_output_directory()) / "s2dm_training" / name
        return [record["loss"] for record in losses(folder).records()]

    train(rig, inference_model, prepared, "whole", steps=6)
    trainer = rig.module("s2dm.training.flow_adapter").AdapterTrainer
    real = trainer.accumulate

    def cancelled(self: Any, batch: Any) -> float:
        if self.step == 3:  # core looks for it in every layer
            management.interrupt_current_processing()
        return real(self, batch)

    monkeypatch.setattr(trainer, "accumulate", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(rig, inference_model, prepared, "stopped", steps=6, preview_every=0)
    monkeypatch.undo()
    assert "stopped.safetensors" in rig.module("nodes.native.files").list_files()
    assert len(logged("stopped")) == 3
    train(rig, inference_model, prepared, "stopped", steps=6)
    assert logged("stopped") == pytest.approx(logged("whole"), rel=1e-5)


def test_out_of_memory_says_what_to_change_and_keeps_what_was_learned(
    rig: Any, inference_model: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = rig.module("s2dm.training.flow_adapter").AdapterTrainer
    real = trainer.accumulate

    def full(self: Any, batch: Any) -> float:
        if self.step == 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")
        return real(self, batch)

    monkeypatch.setattr(trainer, "accumulate", full)
    with pytest.raises(
        ValueError, match=r"Train Flow Adapter \(S2DM\): out of memory.*frames_at_once"
    ):
        train(rig, inference_model, prepared, "memory")
    monkeypatch.undo()
    run = train(rig, inference_model, prepared, "memory")
    assert run[1] == "memory.safetensors"


@pytest.mark.parametrize("name", ["", "../away", "a/b", ".hidden"])
def test_names_that_are_none_of_a_file_are_refused(
    rig: Any, inference_model: Any, prepared: Any, name: str
) -> None:
    with pytest.raises(ValueError, match="name of a file"):
        train(rig, inference_model, prepared, name)


def test_a_file_that_was_not_trained_here_is_not_lost(
    rig: Any, inference_model: Any, prepared: Any
) -> None:
    import folder_paths

    path = Path(folder_paths.get_folder_paths("s2dm")[0]) / "bought.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="Take another name"):
        train(rig, inference_model, prepared, "bought")
    assert path.read_bytes() == b"precious"
    path.unlink()


def test_clips_of_another_model_are_refused(rig: Any, inference_model: Any, tmp_path: Path) -> None:
    import prepared_clips

    clips = prepared_clips.write_clips(tmp_path, width=48)
    with pytest.raises(ValueError, match=r"prompts of width 64.*got 4 and 48"):
        train(rig, inference_model, clips, "other")


@pytest.mark.parametrize("change", ["sdxl", "inpainting", "flow matching", "no U-Net"])
def test_models_that_no_adapter_can_be_trained_for_are_refused_by_name(
    rig: Any, prepared: Any, change: str
) -> None:
    import comfy.model_base
    from comfy.model_base import ModelType

    model = rig.plain_model()
    unet = model.model.diffusion_model
    if change == "sdxl":
        model.model.__class__ = comfy.model_base.SDXL
        unet.num_classes = "sequential"
        expected = "SDXL"
    elif change == "inpainting":
        unet.in_channels = 9
        expected = "inpainting"
    elif change == "flow matching":
        model.model.model_sampling = comfy.model_base.model_sampling(
            model.model.model_config, ModelType.FLOW
        )
        expected = "flow matching"
    else:
        model.model.diffusion_model = torch.nn.Identity()
        expected = "Stable Diffusion"
    with pytest.raises(ValueError, match=rf"Train Flow Adapter \(S2DM\): .*{expected}"):
        train(rig, model, prepared, "refused")


def test_v_prediction_is_known_by_how_a_model_is_sampled(
    rig: Any, prepared: Any, tmp_path: Path
) -> None:
    """By a checkpoint of this kind, and by core's node that makes a MODEL one."""
    import comfy.model_base
    from comfy.model_base import ModelType
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    def kind(model: Any) -> str:
        return rig.module("nodes.native.training").schedule_of(model)[1]

    plain = rig.plain_model()
    node = ModelSamplingDiscrete()
    made = getattr(node, "patch", None) or node.execute
    (patched,) = made(plain, "v_prediction", False)
    (lcm,) = made(plain, "lcm", False)
    assert (kind(plain), kind(patched)) == ("epsilon", "v_prediction")
    with pytest.raises(ValueError, match=r"sampled as .*LCM"):
        kind(lcm)
    loaded = rig.plain_model()
    loaded.model.model_type = ModelType.V_PREDICTION
    loaded.model.model_sampling = comfy.model_base.model_sampling(
        loaded.model.model_config, ModelType.V_PREDICTION
    )
    runs = [
        Run(rig, model, prepared, tmp_path / str(number), steps=1)
        for number, model in enumerate((loaded, patched, plain))
    ]
    by_file, by_node, epsilon = (run.trainer.losses[0] for run in runs)
    assert by_file == pytest.approx(by_node, rel=1e-5)
    assert by_file != pytest.approx(epsilon, rel=1e-2)
    assert runs[0].picture.isfinite().all()


def test_a_file_says_which_model_it_was_trained_for(
    rig: Any, inference_model: Any, prepared: Any
) -> None:
    def base(name: str) -> str:
        file = train(rig, inference_model, prepared, name, steps=1, preview_every=0)[1]
        path = rig.module("nodes.native.files").find_file(file)
        return rig.module("s2dm.models").read_config(path).adapter_training.base

    before = getattr(inference_model, "cached_patcher_init", None)
    try:
        inference_model.cached_patcher_init = (None, ("/models/checkpoints/dream 1.safetensors",))
        assert base("known") == "dream 1"
        inference_model.cached_patcher_init = None
        assert base("unknown") == ""
    finally:
        inference_model.cached_patcher_init = before


class Video:
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def get_components(self) -> Any:
        return self


def prepare(rig: Any, **inputs: Any) -> Any:
    values = {
        "vae": rig.loaded.vae, "clip": rig.loaded.clip, "name": "node", "folder": "",
        "captions": "", "width": 64, "height": 48, "frames": 4, "method": "dis", **inputs,
    }  # fmt: skip
    return rig.run(
        "S2DMPrepareClips", **{k: v if isinstance(v, list) else [v] for k, v in values.items()}
    )[0]


def test_clips_come_from_videos_and_a_folder(rig: Any, tmp_path: Path) -> None:
    from s2dm.video import write_clip

    frames = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    write_clip(tmp_path / "wave.mp4", frames, 8)
    (tmp_path / "wave.txt").write_text("a man is waving")
    videos = [Video(frames.movedim(1, -1)), Video(frames.flip(0).movedim(1, -1))]
    clips = prepare(rig, folder=str(tmp_path), videos=videos, captions="one\ntwo")
    assert clips.captions == ["a man is waving", "one", "two"]
    assert clips.latent_shape == (4, 6, 8)
    assert clips.num_frames == 4
    latents = rig.loaded.vae.encode(clips_frames(frames)).float()
    assert (clips.latents(1) - latents).abs().max() < 2e-2 * latents.abs().max()


def clips_frames(frames: torch.Tensor) -> torch.Tensor:
    from s2dm.video import cover

    return cover(frames[[0, 2, 3, 5]], 48, 64).movedim(1, -1)


def test_what_is_missing_is_asked_for(rig: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Prepare Clips \(S2DM\): expected a folder"):
        prepare(rig)
    video = Video(torch.rand(4, 64, 64, 3))
    with pytest.raises(ValueError, match=r"expected 2 captions.*got 1"):
        prepare(rig, videos=[video, video], captions="one")
    with pytest.raises(ValueError, match="which isn't there"):
        prepare(rig, folder=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("fusion", ["channel", "spatial"])
def test_the_command_line_trains_the_same_weights_from_the_same_seed(
    rig: Any, inference_model: Any, prepared: Any, tmp_path: Path, fusion: str
) -> None:
    from s2dm.training.adapter_run import AdapterRunConfig, train_adapter

    settings = {"steps": 5, "clips": 2, "frames": 3, "chunk": 2, "seed": 3, "warmup_steps": 5}
    here = Run(rig, inference_model, prepared, tmp_path / "node", fusion, **settings).trainer
    config = AdapterRunConfig(
        checkpoint=str(rig.checkpoint),
        clips_folder=str(prepared.folder),
        output=str(tmp_path / "command"),
        fusion=fusion,
        width=32,
        hidden=32,
        **settings,
    )
    there = train_adapter(config)
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
    for name, weight in there.averaged_state("adapter").items():
        assert (weight - here.averaged_state("adapter")[name]).abs().max() <= 1e-4, name


def test_the_command_line_gives_a_lora_the_same_gradient(
    rig: Any, inference_model: Any, prepared: Any, tmp_path: Path
) -> None:
    """Not the same weights: where a gradient is nearly nothing, Adam makes steps of rounding."""
    from s2dm.training.adapter_run import AdapterRunConfig, train_adapter

    settings = {"steps": 1, "clips": 2, "frames": 3, "chunk": 2, "seed": 3, "lora_rank": 2}
    here = Run(rig, inference_model, prepared, tmp_path / "node", stir=True, **settings)
    config = AdapterRunConfig(
        checkpoint=str(rig.checkpoint),
        clips_folder=str(prepared.folder),
        output=str(tmp_path / "command"),
        width=32,
        hidden=32,
        **settings,
    )
    there = train_adapter(config)
    networks = there.adapter, there.denoiser.lora
    for network, weights in zip(networks, here.start, strict=True):
        network.load_state_dict(weights)
    there.accumulate(there.batch(0))
    of_lora = len(gradient_of(there.denoiser.lora))
    for part in (slice(None, -of_lora), slice(-of_lora, None)):
        one = gradient_of(*networks)[part]
        assert one.norm() > 0 and (one - here.gradient[part]).norm() <= 1e-3 * one.norm()
