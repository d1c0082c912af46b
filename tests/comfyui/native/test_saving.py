"""Core's save nodes on models with a flow adapter: the files load again, or are not written."""

import logging
from pathlib import Path

import pytest
import torch
from random_checkpoint import TINY, write_random_checkpoint

pytestmark = pytest.mark.comfyui


@pytest.fixture
def output(comfy, tmp_path, monkeypatch):
    """An output folder of its own for core's save nodes."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def save(output: Path, model, clip=None, vae=None) -> Path:
    """Save with core's Save Checkpoint, or Save Model where there is nothing beside the model."""
    from comfy_extras.nodes_model_merging import CheckpointSave, ModelSave

    before = set(output.rglob("*.safetensors"))
    with torch.inference_mode():
        if clip is None:
            ModelSave().save(model, "s2dm/saved")
        else:
            CheckpointSave().save(model, clip, vae, "s2dm/saved")
    (path,) = set(output.rglob("*.safetensors")) - before
    return path


def load(rig, path: Path):
    return rig.module("nodes.native.loading").load_all(str(path))


def same(one: dict, other: dict) -> None:
    """The same weights, in the types that core keeps them in (half for the text encoder)."""
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        for name in one[part]:
            weight = one[part][name]
            assert torch.equal(weight, other[part][name].to(weight.dtype)), name


def test_a_saved_checkpoint_loads_again(rig, output):
    """After sampling too, and with the stage that the file held."""
    checkpoint = rig.module("s2dm.models.checkpoint")
    source = write_random_checkpoint(output / "tiny.safetensors", TINY)
    loaded = load(rig, source)
    encoded = rig.encode(rig.flow(3))
    before = rig.sample(encoded, loaded.model)
    path = save(output, loaded.model, loaded.clip, loaded.vae)
    found, original = (checkpoint.load_checkpoint(file) for file in (path, source))
    assert found.config == original.config
    same(found.states, original.states)
    again = load(rig, path)
    assert again.stage1 is not None
    assert torch.equal(rig.sample(encoded, again.model), before)
    # And a second time, of what was saved.
    found = checkpoint.load_checkpoint(save(output, again.model, again.clip, again.vae))
    assert found.config == original.config
    same(found.states, original.states)


def test_the_model_is_as_before_after_saving(rig, output):
    encoded = rig.encode(rig.flow(3))
    before = rig.sample(encoded)
    kind = type(rig.plain_model().model.model_config)
    save(output, rig.loaded.model, rig.loaded.clip, rig.loaded.vae)
    assert torch.equal(rig.sample(encoded), before)
    assert isinstance(rig.loaded.model.get_model_object("model_config"), kind)
    rig.loaded.model.detach()
    assert type(rig.loaded.model.model.model_config) is kind


def test_a_lora_is_merged_into_the_saved_checkpoint(rig, output):
    checkpoint = rig.module("s2dm.models.checkpoint")
    name = "input_blocks.1.1.proj_in.weight"
    model = rig.loaded.model.clone()
    change = torch.full((32, 32, 1, 1), 0.5)
    model.add_patches({f"diffusion_model.{name}": (change,)}, 1.0)
    path = save(output, model, rig.loaded.clip, rig.loaded.vae)
    states = checkpoint.load_checkpoint(path).states
    weights = checkpoint.load_checkpoint(rig.checkpoint).states
    torch.testing.assert_close(states["unet"][name], weights["unet"][name] + change)
    encoded = rig.encode(rig.flow(3))
    torch.testing.assert_close(
        rig.sample(encoded, load(rig, path).model), rig.sample(encoded, model)
    )


def test_another_adapter_and_its_strength_are_saved(rig, output):
    """On a model of ours; the saved adapter acts as strongly as the one on the model."""
    config, state = rig.adapter()
    other = {name: -weight for name, weight in state.items()}
    patched = rig.module("nodes.native.adapter").apply_adapter(
        rig.loaded.model, config, other, strength=0.5
    )
    alone = rig.loaded.config.adapter_only()
    rig.module("nodes.native.saving").keep_when_saving(patched, alone, 0.5)
    path = save(output, patched, rig.loaded.clip, rig.loaded.vae)
    again = load(rig, path)
    assert again.config == rig.loaded.config
    encoded = rig.encode(rig.flow(3))
    torch.testing.assert_close(rig.sample(encoded, again.model), rig.sample(encoded, patched))
    assert not torch.allclose(rig.sample(encoded, again.model), rig.sample(encoded))


def test_the_node_keeps_its_adapter_when_saving(rig, output, monkeypatch):
    """Apply Flow Adapter on a MODEL of Stable Diffusion, here of the tiny size."""
    checkpoint = rig.module("s2dm.models.checkpoint")
    monkeypatch.setattr(rig.module("nodes.native.saving"), "SD15", rig.loaded.config)
    monkeypatch.setattr(rig.module("nodes.loaders"), "find_file", lambda name: str(rig.checkpoint))
    (patched,) = rig.run("S2DMApplyFlowAdapter", model=rig.plain_model(), adapter="x", strength=2.0)
    path = save(output, patched, rig.loaded.clip, rig.loaded.vae)
    encoded = rig.encode(rig.flow(3))
    again = load(rig, path)
    torch.testing.assert_close(rig.sample(encoded, again.model), rig.sample(encoded, patched))
    # The model alone, for core's Load Diffusion Model, still holds the adapter.
    path = save(output, patched)
    found = checkpoint.load_checkpoint(path)
    config = found.config
    assert config.text_encoder is config.vae is config.tokenizer is None
    assert set(found) == {"unet", "flow_adapter"}


def test_a_base_of_another_kind_keeps_the_adapter(rig, output, caplog):
    """Stable Diffusion 2.x or inpainting, here any: its file is core's, with the adapter in it."""
    checkpoint = rig.module("s2dm.models.checkpoint")
    (patched,) = rig.run_adapter(rig.plain_model())
    alone = rig.loaded.config.adapter_only()
    rig.module("nodes.native.saving").keep_when_saving(patched, alone)
    with caplog.at_level(logging.WARNING):
        path = save(output, patched, rig.loaded.clip, rig.loaded.vae)
    assert "is not that of Stable Diffusion 1.x" in caplog.text
    found = checkpoint.load_checkpoint(path)
    assert found.config == alone and set(found) == {"flow_adapter"}


def test_what_nothing_could_load_is_not_saved(rig, output):
    """A U-Net of its own size without the rest, or with the text encoder of another model."""
    import comfy.sd

    with pytest.raises(ValueError, match=r"S2DM: not saved.*got no (text encoder|vae).*Save Check"):
        save(output, rig.loaded.model)

    class Other:
        """A CLIP of another size."""

        def load_model(self):
            return rig.loaded.clip.load_model()

        def get_sd(self):
            return {"clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(3)}

        state_dict_for_saving = get_sd

    with pytest.raises(ValueError, match="got another text encoder"):
        save(output, rig.loaded.model, Other(), rig.loaded.vae)
    assert not list(output.rglob("*.safetensors"))
    assert isinstance(rig.loaded.clip, comfy.sd.CLIP)
    save(output, rig.loaded.model, rig.loaded.clip, rig.loaded.vae)
