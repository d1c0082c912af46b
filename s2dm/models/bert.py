"""How LFDM's flow generator reads a prompt: the mean state of BERT.

The encoder is transformers' BertModel; its vocabulary rides in the config of a checkpoint as
`{"kind": "wordpiece", "vocab": [...], "lower_case": false}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..settings import SettingsError
from .config.networks import BertConfig
from .keys import bert_keys
from .lfdm import check_weights

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_UNUSED = ("pooler.", "cls.")  # in published files beside the encoder
_FILES = ("model.safetensors", "pytorch_model.bin")


def build_bert(config: BertConfig, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Transformers' encoder in evaluation mode, with random weights if there is no state."""
    from transformers import BertConfig as Settings
    from transformers import BertModel

    encoder = BertModel(
        Settings(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_length,
        ),
        add_pooling_layer=False,
    )
    if state is not None:
        encoder.load_state_dict(dict(state))
    return encoder.eval()


@torch.no_grad()
def mean_state(encoder: Any, spec: Mapping[str, Any], prompt: str) -> Tensor:
    """The mean of BERT's last states over the tokens of a prompt, (1, hidden_size).

    As LFDM takes it: without the token that begins every text, with the one that ends it.
    """
    ids = wordpiece_ids(prompt, spec, encoder.config.max_position_embeddings)
    weight = encoder.embeddings.word_embeddings.weight
    tokens = torch.tensor([ids], device=weight.device)
    states = encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return states[:, 1:].mean(dim=1)


def wordpiece_ids(text: str, spec: Mapping[str, Any], most: int) -> list[int]:
    """The tokens of a text between [CLS] and [SEP], at most `most` with them."""
    from tokenizers.implementations import BertWordPieceTokenizer

    vocabulary = {word: number for number, word in enumerate(spec["vocab"])}
    tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=spec["lower_case"])
    tokenizer.enable_truncation(most)
    return tokenizer.encode(text).ids


def check_wordpiece(spec: Mapping[str, Any] | None, config: BertConfig) -> None:
    """Raise SettingsError unless this is the tokenizer of such an encoder."""
    spec = spec or {}
    words: Any = spec.get("vocab")
    good = (
        spec.get("kind") == "wordpiece"
        and isinstance(words, list)
        and all(isinstance(word, str) for word in words)
        and isinstance(spec.get("lower_case"), bool)
    )
    if not good:
        raise SettingsError(
            "flow_tokenizer: expected a wordpiece vocabulary with lower_case, got "
            f"{str(spec)[:60]!r}."
        )
    if len(set(words)) != config.vocab_size:
        raise SettingsError(
            f"flow_tokenizer: expected {config.vocab_size} words, as the encoder has, got "
            f"{len(set(words))}."
        )
    if lacking := [word for word in _SPECIAL if word not in words]:
        raise SettingsError(f"flow_tokenizer: expected the word {lacking[0]}, got none.")


def is_bert(folder: Path) -> bool:
    """Whether a folder holds a BERT of transformers."""
    return _settings(folder).get("model_type") == "bert"


def read_bert(
    folder: Path, read: Callable[[Path], Mapping[str, Tensor]]
) -> tuple[BertConfig, dict[str, Any], dict[str, Tensor]]:
    """The encoder in a folder as BERT is published: its config, tokenizer and weights.

    Args:
        folder: with `config.json`, `vocab.txt` and the weights.
        read: opens the file of weights, safetensors or pickled.

    Raises:
        ValueError: a file is missing or is another model's.
    """
    settings = _settings(folder)
    try:
        config = BertConfig(
            hidden_size=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            heads=settings["num_attention_heads"],
            intermediate_size=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            max_length=settings["max_position_embeddings"],
        )
    except KeyError as error:
        raise ValueError(f"{folder}: expected {error} in config.json, got none.") from error
    spec = {
        "kind": "wordpiece",
        "vocab": _read_text(folder / "vocab.txt").splitlines(),
        "lower_case": _lower_case(folder),
    }
    check_wordpiece(spec, config)
    return config, spec, _read_weights(folder, config, read)


def _read_weights(
    folder: Path, config: BertConfig, read: Callable[[Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    path = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: expected one of {', '.join(_FILES)}, got none.")
    # TensorFlow's names of a normalisation live on in the oldest files.
    renamed = {
        name.removeprefix("bert.")
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias"): weight
        for name, weight in read(path).items()
    }
    weights = {
        name: weight
        for name, weight in renamed.items()
        if not name.startswith(_UNUSED) and not name.endswith("position_ids")
    }
    check_weights(weights, {key.ldm: key.ldm_shape for key in bert_keys(config)})
    return weights


def _lower_case(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    settings = json.loads(_read_text(path)) if path.exists() else {}
    return bool(settings.get("do_lower_case", False))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(_read_text(path))
    except ValueError:
        return {}  # whatever it is, it is not BERT's
    return settings if isinstance(settings, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: expected {path.name}, got none.") from None
