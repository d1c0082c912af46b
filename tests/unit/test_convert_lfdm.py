"""LFDM's and BERT's files, alone and together with a stage 2, as checkpoints."""

import pytest
import torch
from lfdm_files import BERT, REGIONS, WORDS, region_motion_content, write_bert
from random_checkpoint import tiny_config, write_random_checkpoint

from s2dm.cli import main
from s2dm.convert import ConversionError, convert
from s2dm.models import load_checkpoint, read_config
from s2dm.models.lfdm_region import from_lfdm_region


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.save(region_motion_content(), folder / "RegionMM.pth")
    write_bert(folder / "bert")
    write_random_checkpoint(folder / "stage2.safetensors", tiny_config(flow_generator=None))
    return folder


def test_regionmm_becomes_a_region_motion_model(files, tmp_path):
    convert(files / "RegionMM.pth", tmp_path / "out.safetensors")
    found = load_checkpoint(tmp_path / "out.safetensors")
    assert found.config.region_motion == REGIONS
    assert list(found) == ["region_motion"]
    expected = from_lfdm_region(region_motion_content(), REGIONS)
    assert all(torch.equal(found.states["region_motion"][name], w) for name, w in expected.items())


def test_bert_becomes_the_encoder_of_stage_1_with_its_words(files, tmp_path):
    convert(files / "bert", tmp_path / "out.safetensors")
    config = read_config(tmp_path / "out.safetensors")
    assert config.flow_text_encoder == BERT
    assert config.flow_tokenizer == {"kind": "wordpiece", "vocab": WORDS, "lower_case": False}


def test_files_are_put_together_into_one(files, tmp_path):
    target = tmp_path / "joined.safetensors"
    names = ("RegionMM.pth", "bert")
    code = main(
        ["convert", str(files / "stage2.safetensors"), str(target), "--steps", "7", "--with"]
        + [str(files / name) for name in names]
    )
    assert code == 0
    found = load_checkpoint(target)
    assert set(found) == {
        "unet", "vae", "text_encoder", "flow_adapter", "region_motion", "flow_text_encoder",
    }  # fmt: skip
    assert found.config.flow_tokenizer["vocab"] == WORDS
    assert found.config.tokenizer["kind"] == "bpe"
    assert found.config.sampling.steps == 7
    assert found.config.licence == "none: random numbers"
    assert "BERT from bert" in found.config.data and "RegionMM.pth" in found.config.data


def test_what_is_no_part_is_refused(files, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match=r"other\.pth: expected an S2DM checkpoint"):
        convert(
            files / "stage2.safetensors",
            tmp_path / "out.safetensors",
            beside=[tmp_path / "other.pth"],
        )
    with pytest.raises(ConversionError, match="safetensors"):
        convert(files / "bert", tmp_path / "folder")
    with pytest.raises(ConversionError, match="nothing at"):
        convert(files / "bert", tmp_path / "out.safetensors", beside=[tmp_path / "absent"])
    broken = region_motion_content()
    del broken["generator"]["final.bias"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ConversionError, match=r"RegionMM as published.*final\.bias"):
        convert(tmp_path / "broken.pth", tmp_path / "out.safetensors")
    (files / "bert" / "vocab.txt").rename(files / "bert" / "words.txt")
    try:
        with pytest.raises(ConversionError, match=r"BERT as published.*vocab\.txt"):
            convert(files / "bert", tmp_path / "out.safetensors")
    finally:
        (files / "bert" / "words.txt").rename(files / "bert" / "vocab.txt")
