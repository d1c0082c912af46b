"""Files as LFDM and BERT are published, small and random, and a checkpoint that joins them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import lfdm_region_recipe
import torch
from random_checkpoint import TINY, random_weight

from s2dm.models import BertConfig, FlowGeneratorConfig, RegionMotionConfig
from s2dm.models.keys import bert_keys
from s2dm.models.lfdm_region import NETWORKS, lfdm_region_keys

REGIONS = RegionMotionConfig(
    size=(32, 32),
    regions=4,
    levels=3,
    width=8,
    flow_width=16,
    max_width=64,
    map_padding=3,
    frame_width=8,
    frame_blocks=2,
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "squat", "wave", "right", "##ing", "hand"]
BERT = BertConfig(
    hidden_size=24, layers=2, heads=2, intermediate_size=32, vocab_size=len(WORDS), max_length=16
)
GENERATOR = FlowGeneratorConfig(
    reference_channels=REGIONS.feature_channels,
    text_dim=BERT.hidden_size,
    model_channels=16,
    channel_mult=(1, 2),
    num_heads=2,
    head_dim=8,
    norm_groups=4,
    size=REGIONS.flow_size,
    frames=5,
    flow="positions",
)
JOINED = dataclasses.replace(
    TINY,
    flow_generator=GENERATOR,
    region_motion=REGIONS,
    flow_text_encoder=BERT,
    flow_tokenizer={"kind": "wordpiece", "vocab": WORDS, "lower_case": False},
)
"""A checkpoint of which LFDM makes the flow."""


def region_motion_content(config: RegionMotionConfig = REGIONS, **more: Any) -> dict[str, Any]:
    """What LFDM would pickle of a RegionMM of these sizes, random."""
    content: dict = {part: {} for part in NETWORKS}
    for key in lfdm_region_keys(config):
        part, name = key.lfdm.split(".", 1)
        content[part][name] = lfdm_region_recipe.fill(key.lfdm, key.shape)
    # Numbers that follow from the settings, which LFDM keeps beside the weights.
    content["region_predictor"]["down.weight"] = torch.rand(3, 1, 13, 13)
    content["generator"]["pixelwise_flow_predictor.down.weight"] = torch.rand(3, 1, 13, 13)
    content["bg_predictor"]["encoder.down_blocks.0.norm.num_batches_tracked"] = torch.tensor(9)
    return content | {"example": 4_650_000} | more


def write_bert(folder: Path, config: BertConfig = BERT) -> Path:
    """A folder with BERT, in the oldest of its spellings."""
    folder.mkdir()
    settings = {
        "model_type": "bert",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
    }
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}', "utf-8")
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"bert.{key.ldm}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): random_weight(key.ldm_shape, generator)
        for key in bert_keys(config)
    }
    weights["bert.pooler.dense.weight"] = torch.zeros(1)
    weights["cls.predictions.bias"] = torch.zeros(1)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder
