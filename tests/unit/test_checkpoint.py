"""The checkpoint format: what is written comes back, and each wrong file has its own error."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from lfdm_files import JOINED
from random_checkpoint import TINY, random_states, write_random_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from s2dm.models import (
    PARTS,
    Checkpoint,
    CheckpointError,
    SamplingConfig,
    checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
)

CONFIG = dataclasses.replace(TINY, data="nothing at all")
VOCABULARY = CONFIG.text_encoder.vocab_size
ADAPTER_KEY = "s2dm.flow_adapter.layers.middle_0_0.to_v.weight"


@pytest.fixture(scope="module")
def states():
    return random_states(CONFIG)


@pytest.fixture
def saved(tmp_path, states):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(CONFIG, states))
    return path


def rewrite(path, change_tensors=None, change_config=None, metadata=None):
    """Save the file again with other tensors or metadata, as another tool would."""
    tensors = load_file(path)
    if metadata is None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        values = json.loads(metadata["s2dm"])
        if change_config:
            change_config(values)
        metadata = {"s2dm": json.dumps(values)}
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata=metadata)


def refused(path):
    """The message with which the file is refused; it is one line and names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    assert "\n" not in message
    return message


def test_what_is_written_comes_back(tmp_path):
    """With every part that there is."""
    states = random_states(JOINED)
    loaded = load_checkpoint(write_random_checkpoint(tmp_path / "all.safetensors", JOINED))
    assert loaded.config == JOINED
    assert set(loaded) == set(loaded.states) == set(states) == set(PARTS)
    for part, state in states.items():
        assert loaded[part].config == getattr(JOINED, part)
        assert loaded[part].state is loaded.states[part]
        assert loaded[part].state.keys() == state.keys()
        assert all(torch.equal(loaded[part].state[name], state[name]) for name in state)


def test_a_checkpoint_is_the_parts_whose_weights_it_has(states):
    alone = Checkpoint(CONFIG, {"vae": states["vae"]})
    assert "vae" in alone and "unet" not in alone
    assert list(alone) == ["vae"]
    assert [part for part in PARTS if getattr(alone.config, part) is not None] == ["vae"]
    assert (alone.config.vae, alone.config.data) == (CONFIG.vae, CONFIG.data)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint with unet, got .*with vae\."):
        alone["unet"]
    with pytest.raises(CheckpointError, match=r"with unet, got one with nothing\."):
        Checkpoint(CONFIG, {})["unet"]


def test_a_checkpoint_refuses_weights_that_its_config_does_not_describe(states):
    without = dataclasses.replace(CONFIG, flow_generator=None)
    message = r"expected weights for unet, .*, flow_adapter, as the config says, got .*generator\."
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(without, states)
    with pytest.raises(CheckpointError, match=r"got vae, sound\."):
        Checkpoint(CONFIG, {"vae": states["vae"], "sound": {}})


def test_the_file_has_stable_diffusions_keys(saved):
    keys = load_file(saved).keys()
    assert "model.diffusion_model.input_blocks.0.0.weight" in keys
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in keys
    assert "first_stage_model.decoder.conv_out.bias" in keys
    assert ADAPTER_KEY in keys


def test_the_recommended_sampling_is_kept_and_older_files_recommend_the_papers(saved, states):
    sampling = SamplingConfig(steps=12, guidance_scale=1.75, flow_guidance_scale=1, flow_start=0.25)
    save_checkpoint(saved, Checkpoint(dataclasses.replace(CONFIG, sampling=sampling), states))
    assert read_config(saved).sampling == sampling
    assert read_config(saved).adapter_only().sampling == sampling
    rewrite(saved, change_config=lambda values: values["sampling"].pop("steps"))
    assert read_config(saved).sampling == dataclasses.replace(sampling, steps=20)
    rewrite(saved, change_config=lambda values: values.pop("sampling"))
    assert read_config(saved).sampling == SamplingConfig(20, 7.5, None)


def test_half_precision_storage(tmp_path, states):
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, Checkpoint(CONFIG, states), dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    loaded = load_checkpoint(path)["unet"].state
    name = "out.2.weight"
    torch.testing.assert_close(loaded[name].float(), states["unet"][name], rtol=1e-3, atol=1e-3)


def test_an_adapter_alone(tmp_path, states):
    path = tmp_path / "adapter.safetensors"
    adapter = {"flow_adapter": states["flow_adapter"]}
    save_checkpoint(path, Checkpoint(CONFIG.adapter_only(), adapter))
    loaded = load_checkpoint(path)
    config = loaded.config
    assert config.flow_adapter == CONFIG.flow_adapter
    assert config.unet is config.vae is config.text_encoder is None
    assert list(loaded) == ["flow_adapter"]
    prefix = PARTS["flow_adapter"].prefix
    assert load_file(path).keys() == {prefix + name for name in adapter["flow_adapter"]}
    with pytest.raises(CheckpointError, match="expected a file with unet, vae, got one with flow"):
        load_checkpoint(path, ["unet", "vae"])


def test_a_part_is_read_without_the_others(saved, monkeypatch):
    read = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(checkpoint, "safe_open", Recorder)
    loaded = load_checkpoint(saved, ["flow_adapter"])
    assert list(loaded) == ["flow_adapter"]
    assert read and all(name.startswith("s2dm.flow_adapter.") for name in read)
    read.clear()
    read_config(saved)
    assert read == []


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5, 0.999])
def test_truncated(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: max(9, int(len(content) * share))])
    assert "truncated: expected" in refused(saved)


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        (b"", "an empty file"),
        (b"hello", "a short text"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><html></html>" + b" " * 2000, "a web page"),
        (b"<html><body>Sign in</body></html>", "a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "an XML document"),
        (b'{"error": "Repository not found"}', "a JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a git-lfs pointer"),
        (b"\0" * 99, "nothing but zeros"),
        (b"7z\xbc\xaf\x27\x1c" + b"\1" * 99, "a 7-Zip archive"),
        (b"PK\3\4" + b"\1" * 99, "first 103 bytes of a longer file: it is truncated"),
        (b"GGUF" + b"\1" * 99, "a GGUF file"),
        (bytes(range(128, 256)), "something else"),
    ],
)
def test_what_is_no_safetensors_file_is_told_for_what_it_is(tmp_path, content, meaning):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    assert f"expected a safetensors file, got {meaning}" in refused(path).replace(
        "the first", "first"
    )


def test_damaged_header(saved):
    content = bytearray(saved.read_bytes())
    content[9:12] = b"\xff\xff\xff"
    saved.write_bytes(content)
    assert "header, got one that is damaged" in refused(saved)


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": "s2dm"},
        {"__metadata__": {"s2dm": 3}},
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}},
        '{"a":' + "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_a_header_that_is_no_header(tmp_path, header):
    path = tmp_path / "odd.safetensors"
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert "header, got one that is damaged" in refused(path)


class Trap:
    """Leaves a mark if anybody unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_renamed_pickle_is_never_opened(tmp_path, kind):
    path, mark = tmp_path / "renamed.safetensors", tmp_path / "mark"
    if kind == "torch":
        torch.save({"state_dict": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(mark)))
    assert "got a pickle" in refused(path)
    assert "s2dm convert" in refused(path)
    assert not mark.exists()


def test_missing_file_and_folder(tmp_path):
    assert "could not be read" in refused(tmp_path / "nowhere.safetensors")
    assert "could not be read" in refused(tmp_path)


def test_plain_stable_diffusion(saved):
    rewrite(saved, metadata={"format": "pt"})
    message = refused(saved)
    assert "got a Stable Diffusion one without S2DM metadata" in message
    assert "apply a flow adapter" in message


def test_a_foreign_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down.weight": torch.zeros(2)}, path)
    assert "expected S2DM metadata" in refused(path)


def as_tensor(values):
    """A config as programs keep it that drop metadata."""
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def test_the_config_may_ride_as_a_tensor(saved, states):
    extra = {"s2dm.config": as_tensor(CONFIG.to_dict()), "v_pred": torch.tensor([])}
    rewrite(saved, lambda tensors: tensors.update(extra), metadata={"prompt": "{}"})
    loaded = load_checkpoint(saved)
    assert loaded.config == CONFIG
    for part, state in states.items():
        found = loaded[part].state
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    rewrite(saved, lambda tensors: tensors.pop(ADAPTER_KEY), metadata={})
    assert f"missing '{ADAPTER_KEY}'" in refused(saved)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3, 4, dtype=torch.uint8), "expected a JSON text in 's2dm.config', got U8"),
        (torch.zeros(12), "expected a JSON text in 's2dm.config', got F32"),
        (torch.full((12,), 200, dtype=torch.uint8), "expected JSON metadata"),
        (as_tensor([1]), "expected a format version"),
    ],
)
def test_a_damaged_config_tensor(saved, tensor, expected):
    rewrite(saved, lambda tensors: tensors.update({"s2dm.config": tensor}), metadata={})
    assert expected in refused(saved)


def test_future_format_version(saved):
    rewrite(saved, change_config=lambda values: values.update(format_version=7, sound="stereo"))
    message = refused(saved)
    assert "expected format version 1 or older, got 7" in message
    assert "Update" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v.pop("format_version"), "expected a format version, got None"),
        (lambda v: v.update(sound="stereo"), "unknown setting 'sound'"),
        (lambda v: v["unet"].update(num_heads=0), "UNetConfig.num_heads: expected a whole number"),
        (lambda v: v["unet"].update(channel_mult="wide"), "UNetConfig.channel_mult: expected"),
        (lambda v: v["unet"].update(channel_mult=[1, 2**40]), "UNetConfig.channel_mult: expected"),
        (lambda v: v["unet"].update(channel_mult=[1] * 99), "UNetConfig.channel_mult: expected"),
        (lambda v: v["unet"].update(num_res_blocks=10**9), "UNetConfig.num_res_blocks: expected"),
        (lambda v: v["vae"].update(channels=2**62), "VAEConfig.channels: expected a whole number"),
        (lambda v: v["vae"].update(scaling_factor=1e999), "VAEConfig.scaling_factor: expected"),
        (lambda v: v["text_encoder"].update(layers=10**9), "TextEncoderConfig.layers: expected"),
        (lambda v: v["flow_adapter"].update(width=2**62), "FlowAdapterConfig.width: expected"),
        (lambda v: v["flow_adapter"].update(grid=[2**40, 2**40]), "FlowAdapterConfig.grid: expec"),
        (lambda v: v["flow_adapter"].update(layers=[["a.b", 8]]), "FlowAdapterConfig.layers: exp"),
        (lambda v: v["flow_adapter"].update(frequencies=10**6), "FlowAdapterConfig.frequencies:"),
        (
            lambda v: v["flow_generator"].update(model_channels=2**62),
            "FlowGeneratorConfig.model_channels: expected",
        ),
        (
            lambda v: v["flow_generator"].update(num_heads=2**16, head_dim=2**16),
            "expected shape",
        ),
        (lambda v: v.update(frames=10**12), "S2DMConfig.frames: expected a whole number from 1"),
        (lambda v: v.update(resolution=[2**40, 8]), "S2DMConfig.resolution: expected"),
        (lambda v: v["schedule"].update(steps=10**12), "ScheduleConfig.steps: expected"),
        (lambda v: v.update(data=[]), "S2DMConfig.data: expected text"),
        (lambda v: v["vae"].update(scaling_factor="big"), "VAEConfig.scaling_factor: expected"),
        (lambda v: v["schedule"].update(beta_start="low"), "ScheduleConfig.beta_start: expected"),
        (lambda v: v.update(noise_sharing="some"), "noise_sharing: expected one of"),
        (lambda v: v["flow_adapter"].update(fusion="sum"), "fusion: expected one of"),
        (lambda v: v["flow_adapter"].update(fusion="spatial"), "missing"),
        (lambda v: v["flow_adapter"].update(levels=[2**40]), "levels: expected ascending"),
        (lambda v: v["flow_adapter"].update(levels=3), "levels: expected ascending"),
        (lambda v: v.update(adapter_training=3), "adapter_training: expected a table"),
        (lambda v: v.update(unet=3), "unet: expected a table of settings, got 3"),
        (lambda v: v.update(schedule=None), "schedule: expected"),
        (lambda v: v.update(sampling=None), "sampling: expected"),
        (lambda v: v.update(sampling={"cfg": 2}), "SamplingConfig: unknown setting sampling.'cfg'"),
        (lambda v: v["sampling"].update(steps=0), "SamplingConfig.steps: expected a whole number"),
        (
            lambda v: v["sampling"].update(guidance_scale=None),
            "SamplingConfig.guidance_scale: expected a number from 0, got None",
        ),
        (
            lambda v: v["sampling"].update(flow_guidance_scale=float("nan")),
            "SamplingConfig.flow_guidance_scale: expected a number from 0, got nan",
        ),
        (
            lambda v: v["sampling"].update(flow_start=1.5),
            "SamplingConfig.flow_start: expected a number from 0 to 1, got 1.5",
        ),
        (
            lambda v: v.update(tokenizer={"kind": "bpe", "merges": []}),
            f"expected {VOCABULARY} tokens",
        ),
        (lambda v: v.update(tokenizer=None), "expected kind 'bpe' or 'clip', got None"),
        (
            lambda v: v.update(dict.fromkeys(PARTS)),
            "got none",
        ),
    ],
)
def test_damaged_config(saved, change, expected):
    rewrite(saved, change_config=change)
    assert expected in refused(saved)


@pytest.mark.parametrize("text", ["{", "[]", "3", "null"])
def test_damaged_metadata(saved, text):
    rewrite(saved, metadata={"s2dm": text})
    assert "metadata are damaged" in refused(saved)


def test_missing_keys(saved):
    rewrite(saved, lambda tensors: [tensors.pop(k) for k in list(tensors) if "to_v" in k])
    message = refused(saved)
    assert "missing 'model.diffusion_model" in message
    assert "more" in message


def test_unexpected_keys(saved):
    rewrite(saved, lambda tensors: tensors.update({"lora.weight": torch.zeros(1)}))
    assert "got also 'lora.weight'" in refused(saved)


def test_position_ids_of_older_tools_are_ignored(saved):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    rewrite(saved, lambda tensors: tensors.update({key: torch.arange(77)[None]}))
    read = load_checkpoint(saved)["text_encoder"].state
    assert read and not any("position_ids" in name for name in read)


def test_wrong_shapes(saved):
    rewrite(saved, lambda tensors: tensors.update({ADAPTER_KEY: torch.zeros(64, 31)}))
    assert f"expected shape (64, 32) for '{ADAPTER_KEY}', got (64, 31)" in refused(saved)


def test_wrong_types(saved):
    rewrite(
        saved, lambda tensors: tensors.update({ADAPTER_KEY: torch.zeros(64, 32, dtype=torch.int8)})
    )
    assert f"expected floating-point weights, got I8 in '{ADAPTER_KEY}'" in refused(saved)


def test_weights_of_eight_bits_are_stored_as_sixteen(saved, tmp_path):
    stored = load_checkpoint(saved)
    small = {
        part: {name: weight.to(torch.float8_e4m3fn) for name, weight in state.items()}
        for part, state in stored.states.items()
    }
    small = Checkpoint(stored.config, small)
    path = tmp_path / "small.safetensors"
    with pytest.raises(CheckpointError, match="stored as float16: s2dm convert --half"):
        save_checkpoint(path, small)
    save_checkpoint(path, small, torch.float16)
    assert load_checkpoint(path).config == stored.config


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(saved, value):
    rewrite(saved, lambda tensors: tensors[ADAPTER_KEY][3].fill_(value))
    assert f"got NaN or infinity in '{ADAPTER_KEY}'" in refused(saved)


def test_the_same_process_reads_on_after_an_error(saved, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(saved.read_bytes()[:5000])
    refused(bad)
    assert load_checkpoint(saved).config == CONFIG


def test_saving_refuses_what_loading_would_refuse(tmp_path, states):
    path = tmp_path / "model.safetensors"
    adapter = states["flow_adapter"]

    def refuses(message, config=None, states=None, **arguments):
        config = config or CONFIG.adapter_only()
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(path, Checkpoint(config, states), **arguments)
        assert os.listdir(tmp_path) == []

    refuses("expected weights for flow_adapter, as the config says, got unet, .*", states=states)
    refuses("missing", states={"flow_adapter": {}})
    refuses("got also", states={"flow_adapter": {**adapter, "more": torch.zeros(1)}})
    refuses("expected shape", states={"flow_adapter": {**adapter, "null": torch.zeros(1)}})
    nan = {**adapter, "null": torch.full_like(adapter["null"], float("nan"))}
    refuses("not saved: expected finite", states={"flow_adapter": nan})
    large = {**adapter, "null": torch.full_like(adapter["null"], 1e6)}
    refuses("not saved: .*infinity", states={"flow_adapter": large}, dtype=torch.float16)
    wrong = dataclasses.replace(CONFIG, tokenizer={"kind": "bpe", "merges": []})
    refuses(f"not saved: tokenizer: expected {VOCABULARY} tokens", wrong, states)


def test_a_save_that_fails_leaves_the_old_file(saved, states, monkeypatch):
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, Checkpoint(CONFIG, states))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
