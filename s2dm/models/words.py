"""Which words of a prompt the tokenizer of a checkpoint doesn't know.

A small tokenizer, trained on the captions of one data set, has a token for every word of them. Of
any other word it makes pieces that the text encoder never saw in that order, and nothing says so.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from .tokenizer import split_words, vocabulary, word_tokens

# With so many tokens it was trained on so much text that pieces mean something too, as CLIP's do.
_KNOWS_PIECES = 10_000

# How ComfyUI's prompts name files of embeddings, which aren't read as words.
_EMBEDDING = re.compile(r"embedding:\S+")


def unknown_words(text: str, spec: Mapping[str, Any] | None) -> list[str]:
    """The words of a prompt that a checkpoint's tokenizer has no token for, each once, in order.

    Punctuation is left out, and so are the weights and embeddings of ComfyUI's prompts.

    Args:
        text: the prompt.
        spec: of the tokenizer, as in `S2DMConfig.tokenizer`.
    """
    if spec is None or spec.get("kind") != "bpe" or len(vocabulary(spec)) > _KNOWS_PIECES:
        return []
    words = dict.fromkeys(split_words(_EMBEDDING.sub(" ", text)))
    return [word for word in words if _says_something(word) and len(word_tokens(word, spec)) > 1]


def unknown_words_message(words: Iterable[str]) -> str:
    """What to tell people of such words."""
    return (
        f"The checkpoint doesn't know: {', '.join(words)}. Its text encoder learned from captions "
        "without these words, so the clip will hardly show what they mean."
    )


def _says_something(word: str) -> bool:
    # Letters, digits, and symbols such as emoji; "'s" says no more than its noun.
    kinds = {unicodedata.category(character) for character in word}
    return not word.startswith("'") and any(kind[0] in "LN" or kind == "So" for kind in kinds)
