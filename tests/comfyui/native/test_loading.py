"""Checkpoints as ComfyUI's own MODEL, CLIP and VAE, and adapters that don't fit."""

from __future__ import annotations

import shutil

import pytest
import torch

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def folder(rig, tmp_path_factory):
    """A folder of the user's for S2DM files, with the tiny checkpoint in it."""
    import folder_paths

    path = tmp_path_factory.mktemp("users")
    folder_paths.add_model_folder_path("s2dm", str(path))
    shutil.copy(rig.checkpoint, path / "mine.safetensors")
    (path / "notes.txt").write_text("not a checkpoint")
    folder_paths.filename_list_cache.pop("s2dm", None)
    return path


def test_files_of_the_user_and_of_the_pack_are_offered(rig, folder):
    files = rig.module("nodes.native.files")
    names = files.list_files()
    assert "mine.safetensors" in names and "notes.txt" not in names
    assert files.find_file("mine.safetensors") == str(folder / "mine.safetensors")
    for name in names:
        assert files.find_file(name)
    with pytest.raises(ValueError, match=r"got 'gone\.safetensors'.*refresh"):
        files.find_file("gone.safetensors")
    with pytest.raises(ValueError, match="expected a file among"):
        files.find_file("../../pyproject.toml (bundled)")


def test_the_loader_gives_core_objects(rig, folder):
    import comfy.model_patcher
    import comfy.sd

    model, clip, vae, generator = rig.run("S2DMCheckpointLoader", checkpoint="mine.safetensors")
    assert isinstance(model, comfy.model_patcher.ModelPatcher)
    assert isinstance(clip, comfy.sd.CLIP) and isinstance(vae, comfy.sd.VAE)
    assert "mine.safetensors holds stage 2 alone" in generator.why
    encoded = rig.encode(rig.flow(3))
    assert torch.equal(rig.sample(encoded, model), rig.sample(encoded))


def test_the_adapter_node_gives_what_the_loader_gives(rig, folder):
    (patched,) = rig.run(
        "S2DMApplyFlowAdapter", model=rig.plain_model(), adapter="mine.safetensors"
    )
    encoded = rig.encode(rig.flow(3))
    assert torch.equal(rig.sample(encoded, patched), rig.sample(encoded))


def test_every_weight_of_the_file_arrives(rig):
    loading = rig.module("nodes.native.loading")
    checkpoint = rig.module("s2dm.models.checkpoint")
    states = checkpoint.load_checkpoint(rig.checkpoint).states
    loaded = loading.load_all(str(rig.checkpoint))
    arrived = {
        "unet": loaded.model.model.diffusion_model.state_dict(),
        "vae": loaded.vae.first_stage_model.state_dict(),
        "text_encoder": loaded.clip.cond_stage_model.clip_l.transformer.state_dict(),
        "flow_adapter": loaded.model.get_additional_models_with_key("s2dm_flow_adapter")[
            0
        ].model.state_dict(),
    }
    assert set(states) == set(arrived)
    for part, state in states.items():
        extra = {"text_projection.weight"} if part == "text_encoder" else set()
        assert set(arrived[part]) == set(state) | extra
        for name, weight in state.items():
            there = arrived[part][name]
            assert torch.equal(there, weight.to(there.dtype)), f"{part} {name}"


@pytest.mark.parametrize("place", ["cpu", "cpu:0"])
def test_a_unet_that_was_made_on_the_gpu_is_counted(rig, monkeypatch, place):
    """Core makes it there where more of the GPU's memory is free than of the computer's."""
    import comfy.model_management

    loaded = []
    load = comfy.model_management.load_models_gpu

    def record(models, **options):
        loaded.extend((model, options) for model in models)
        return load(models, **options)

    # To PyTorch another device than "cpu", and yet there on every machine.
    monkeypatch.setattr(
        comfy.model_management, "unet_inital_load_device", lambda *args: torch.device(place)
    )
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", record)
    model = rig.module("nodes.native.loading").load_all(str(rig.checkpoint)).model
    counted = [options for one, options in loaded if one.model is model.model]
    assert counted == ([] if place == "cpu" else [{"force_full_load": True}])


def test_prompts_are_tokenised_as_by_the_checkpoint(rig):
    """Core's tokenizer adds start, end and padding, and gives the words the file's ids."""
    config = rig.loaded.config
    vocabulary = rig.module("s2dm.models.tokenizer").vocabulary(config.tokenizer)
    (tokens,) = rig.loaded.clip.tokenize("a man (in:1.3) a red shirt")["l"]
    ids = [token for token, _ in tokens]
    assert len(ids) == 77
    assert ids[0] == config.text_encoder.bos_token_id
    words = [vocabulary[f"{word}</w>"] for word in "a man in a red shirt".split()]
    assert ids[1 : 1 + len(words)] == words
    assert set(ids[1 + len(words) :]) == {config.text_encoder.eos_token_id}
    assert tokens[3][1] == pytest.approx(1.3)


def test_the_vae_goes_there_and_back(rig):
    with torch.inference_mode():
        latents = rig.loaded.vae.encode(torch.rand(2, 64, 48, 3))
        assert latents.shape == (2, 4, 8, 6)
        assert rig.loaded.vae.decode(latents).shape == (2, 64, 48, 3)


def test_the_schedule_is_the_checkpoints(rig):
    import comfy.model_sampling

    config = rig.loaded.config
    sampling = rig.loaded.model.get_model_object("model_sampling")
    assert isinstance(sampling, comfy.model_sampling.EPS)
    start, end = config.schedule.beta_start, config.schedule.beta_end
    betas = torch.linspace(start**0.5, end**0.5, config.schedule.steps, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    assert torch.allclose(sampling.sigmas.double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-4)
    latent_format = rig.loaded.model.get_model_object("latent_format")
    assert latent_format.scale_factor == config.vae.scaling_factor


def test_v_prediction(rig, tmp_path):
    import dataclasses

    import comfy.model_sampling

    checkpoint = rig.module("s2dm.models.checkpoint")
    found = checkpoint.load_checkpoint(rig.checkpoint)
    schedule = dataclasses.replace(found.config.schedule, prediction_type="v_prediction")
    config = dataclasses.replace(found.config, schedule=schedule)
    path = tmp_path / "v.safetensors"
    checkpoint.save_checkpoint(path, checkpoint.Checkpoint(config, found.states))
    model = rig.module("nodes.native.loading").load_all(str(path)).model
    sampling = model.get_model_object("model_sampling")
    assert isinstance(sampling, comfy.model_sampling.V_PREDICTION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"beta_schedule": "linear"}}, "expected scaled_linear, got 'linear'"),
        ({"vae": {"channel_mult": (1, 1)}}, "4 latent channels of 8 pixels a side, got 4 of 2"),
    ],
)
def test_what_comfyui_cannot_run_is_refused(rig, tmp_path, change, message):
    import dataclasses
    import importlib

    checkpoint = rig.module("s2dm.models.checkpoint")
    keys = rig.module("s2dm.models.keys")
    found = checkpoint.load_checkpoint(rig.checkpoint)
    config = found.config
    for part, values in change.items():
        config = dataclasses.replace(
            config, **{part: dataclasses.replace(getattr(config, part), **values)}
        )
    vae = {key.ldm: torch.zeros(key.ldm_shape) for key in keys.vae_keys(config.vae)}
    path = tmp_path / "other.safetensors"
    other = checkpoint.Checkpoint(config, {**found.states, "vae": vae})
    checkpoint.save_checkpoint(path, other)
    with pytest.raises(importlib.import_module(checkpoint.__name__).CheckpointError, match=message):
        rig.module("nodes.native.loading").load_all(str(path))


def test_an_adapter_for_another_unet_is_refused(rig):
    import dataclasses

    adapter = rig.module("nodes.native.adapter")
    config, state = rig.adapter()
    layers = (("input_1_0", 320), *config.layers[1:], ("output_11_0", 320))
    with pytest.raises(ValueError, match=r"2 of .* don't fit.*input_1_0 is 32 \(expected 320\)"):
        adapter.apply_adapter(rig.plain_model(), dataclasses.replace(config, layers=layers), state)


def test_a_model_that_is_no_stable_diffusion_is_refused(rig, folder):
    import comfy.model_patcher

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)

    device = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(Other(), device, device)
    with pytest.raises(
        ValueError, match=r"^Apply Flow Adapter \(S2DM\): .*Stable Diffusion .*, got Linear"
    ):
        rig.run("S2DMApplyFlowAdapter", model=model, adapter="mine.safetensors")


def test_a_file_without_adapter_is_refused(rig, folder):
    checkpoint = rig.module("s2dm.models.checkpoint")
    path = folder / "plain.safetensors"
    without = checkpoint.load_checkpoint(rig.checkpoint, ("unet", "text_encoder", "vae"))
    checkpoint.save_checkpoint(path, without)
    for node, inputs in (
        ("S2DMCheckpointLoader", {"checkpoint": path.name}),
        ("S2DMApplyFlowAdapter", {"adapter": path.name, "model": rig.plain_model()}),
    ):
        with pytest.raises(ValueError, match=r"\(S2DM\): plain\.safetensors: .*flow.adapter"):
            rig.run(node, **inputs)


def test_previews_have_the_colours_of_the_vae(rig, monkeypatch):
    """One a step, through core's own previewer, nearer to the picture than with core's colours."""
    import comfy.utils
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args
    from comfy.latent_formats import SD15

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    previews = []
    bar = comfy.utils.ProgressBar

    class Recorded(bar):
        def update_absolute(self, value, total=None, preview=None):
            previews.append((value, total, preview))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Recorded)
    rig.sample(rig.encode(rig.flow(3)), steps=3)
    assert [(value, total) for value, total, _ in previews] == [(1, 3), (2, 3), (3, 3)]
    assert all(preview[1].size == (8, 8) for _, _, preview in previews)

    own = rig.loaded.model.get_model_object("latent_format")
    colours = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.3, 0.7], [0.9, 0.9, 0.4]])
    with torch.inference_mode():
        latents = own.process_in(
            rig.loaded.vae.encode(colours[:, None, None].expand(-1, 32, 32, -1))
        )

    def error(latent_format):
        show = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
        )
        shown = []
        for latent in latents:
            _, image, _ = show.decode_latent_to_preview_image("PNG", latent[None])
            shown.append(torch.tensor(list(image.getdata())).float().mean(0) / 255)
        return float((torch.stack(shown) - colours).abs().mean())

    assert error(own) < error(SD15())


@pytest.mark.parametrize("channels", [4, 16])
def test_a_vae_of_stable_diffusions_widths_may_have_other_latents(comfy, rig, channels):
    """Core's map of four channels to colours would end the sampling at its first preview."""
    from comfy.latent_formats import SD15

    class Encoder:
        def encode(self, pictures):
            generator = torch.Generator().manual_seed(0)
            colours = pictures[:, :4, :4].permute(0, 3, 1, 2)
            mixed = torch.randn(channels, 3, generator=generator)
            return torch.einsum("lc,nchw->nlhw", mixed, colours)

    latent_format = SD15()
    config = rig.module("s2dm.models").VAEConfig(latent_channels=channels)
    rig.module("nodes.native.previews").fit_preview(latent_format, config, Encoder())
    assert len(latent_format.latent_rgb_factors) == channels
    # Stable Diffusion's own is core's business.
    assert (latent_format.latent_rgb_factors == SD15().latent_rgb_factors) == (channels == 4)
