"""Tokenizers of CLIP's kind: small ones, trained on captions and carried inside the checkpoint,
and CLIP's own, whose merges lie in the package, so that nothing has to be fetched.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over the bytes of each lower-case word,
with CLIP's conventions: the last symbol of a word ends in `</w>`, and the vocabulary is the
256 bytes, the 256 bytes that end a word, the merges in order, and the two special tokens. So
the list of merges is the whole specification, and no text is out of vocabulary. A specification is
`{"kind": "bpe", "merges": ["a b", ...]}`, or `{"kind": "clip"}` for CLIP's 48,894 merges.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import read_text
from .config.checkpoint import S2DMConfig

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
_END = "</w>"
_CLIP_MERGES = Path(__file__).resolve().parent.parent / "assets" / "clip_merges.txt.gz"
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1000) -> dict[str, Any]:
    """Learn merges from captions.

    Args:
        captions: the texts; the result does not depend on their order.
        vocab_size: at most as many tokens, at least 514. Training stops earlier when each
            word of the captions is one token.

    Returns:
        The specification for `S2DMConfig.tokenizer`:
        `{"kind": "bpe", "merges": ["a b", ...]}`.

    Raises:
        ValueError: if `vocab_size` does not hold the bytes and the special tokens.
    """
    room = vocab_size - len(_alphabet()) - 2
    if room < 0:
        raise ValueError(f"vocab_size: expected at least {vocab_size - room}, got {vocab_size}.")
    letters = _byte_letters()
    counts: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        for word in _WORD.findall(caption.lower()):
            symbols = [letters[byte] for byte in word.encode("utf-8")]
            counts[(*symbols[:-1], symbols[-1] + _END)] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < room:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in counts.items():
            merged[_merge(word, best)] += count
        counts = merged
    return {"kind": "bpe", "merges": [" ".join(pair) for pair in merges]}


def vocabulary(spec: Mapping[str, Any]) -> dict[str, int]:
    """Return token to id of a specification; the last two are start and end.

    Raises:
        ValueError: if the specification is of another kind or malformed.
    """
    tokens = dict.fromkeys(_alphabet())
    for left, right in _merges(spec):
        if left not in tokens or right not in tokens:
            raise ValueError(f"tokenizer: expected merges of known symbols, got {left} {right}.")
        tokens[left + right] = None  # two merges may make the same token
    return {token: i for i, token in enumerate([*tokens, BOS, EOS])}


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case, as tokenizers of this kind tell them apart."""
    return _WORD.findall(text.lower())


def word_tokens(word: str, spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The tokens of one word of `split_words`; one token is a word that the captions had."""
    letters = _byte_letters()
    symbols = [letters[byte] for byte in word.encode("utf-8")]
    tokens = (*symbols[:-1], symbols[-1] + _END)
    for pair in _merges(spec):
        tokens = _merge(tokens, pair)
    return tokens


def with_tokenizer(config: S2DMConfig, spec: Mapping[str, Any]) -> S2DMConfig:
    """Return `config` with this tokenizer, and the text encoder's vocabulary to match."""
    if config.text_encoder is None:
        raise ValueError("tokenizer: expected a config with a text encoder, got one without.")
    ids = vocabulary(spec)
    encoder = dataclasses.replace(
        config.text_encoder, vocab_size=len(ids), bos_token_id=ids[BOS], eos_token_id=ids[EOS]
    )
    return dataclasses.replace(config, tokenizer=dict(spec), text_encoder=encoder)


def write_tokenizer(spec: Mapping[str, Any], folder: str | Path) -> None:
    """Write the files that transformers' `CLIPTokenizer` (and so ComfyUI) reads.

    Args:
        spec: a specification.
        folder: created if it is not there.

    Raises:
        ValueError: if the specification is of another kind or malformed.
    """
    vocab = vocabulary(spec)
    merges = [" ".join(pair) for pair in _merges(spec)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    settings = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **special}
    _write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))


def read_tokenizer(folder: str | Path) -> dict[str, Any]:
    """Return the specification of a tokenizer that transformers' `CLIPTokenizer` wrote.

    Args:
        folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        ValueError: if it is none of CLIP's kind, or its ids are others than its merges make.
        OSError: if a file is missing or can't be read.
    """
    folder = Path(folder)
    whole = folder / "tokenizer.json"
    try:
        if whole.is_file():
            model = json.loads(read_text(whole))["model"]
            vocab, merges = model["vocab"], model["merges"]
        else:
            vocab = json.loads(read_text(folder / "vocab.json"))
            merges = read_text(folder / "merges.txt").splitlines()
            merges = [line for line in merges if line and not line.startswith("#version")]
        # Newer files have a merge as a list of two.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        spec = {"kind": "bpe", "merges": merges}
        same = vocabulary(spec) == vocab
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: expected a tokenizer of CLIP's kind, got {error!r}."
        ) from error
    if not same:
        raise ValueError(
            f"{folder}: expected a tokenizer of CLIP's kind, whose vocabulary is made by its "
            "merges, got one with other tokens or ids."
        )
    return {"kind": "clip"} if merges == _clip_merges() else spec


@functools.cache
def _clip_merges() -> list[str]:
    try:
        return gzip.decompress(_CLIP_MERGES.read_bytes()).decode("utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"tokenizer: expected CLIP's merges at {_CLIP_MERGES}, which can't be read ({error}). "
            "Get the complete package."
        ) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    if spec.get("kind") not in ("bpe", "clip"):
        raise ValueError(f"tokenizer: expected kind 'bpe' or 'clip', got {spec.get('kind')!r}.")
    merges = _clip_merges() if spec["kind"] == "clip" else spec.get("merges")
    if not isinstance(merges, (list, tuple)):
        raise ValueError(f"tokenizer: expected a list of merges, got {type(merges).__name__}.")
    pairs = []
    for merge in merges:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else ()
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"tokenizer: expected merges of two symbols, got {merge!r}.")
        pairs.append(pair)
    return pairs


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            result.append("".join(pair))
            i += 2
        else:
            result.append(word[i])
            i += 1
    return tuple(result)


def _alphabet() -> list[str]:
    letters = list(_byte_letters().values())
    return letters + [letter + _END for letter in letters]


def _byte_letters() -> dict[int, str]:
    """Map each byte to a printable letter, as byte-level tokenizers agree to.

    Printable Latin-1 bytes stand for themselves; the others take letters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return letters
