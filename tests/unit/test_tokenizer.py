"""The caption tokenizer: learned merges, and the files that CLIP tokenizers read."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2dm.models import PUPPETS, train_tokenizer, with_tokenizer, write_tokenizer
from s2dm.models.tokenizer import BOS, EOS, vocabulary

CAPTIONS = [
    "A man with glasses, wearing a black coat and blue jeans is squat",
    "A woman, wearing a red shirt and green trousers is wave",
    "A man, wearing a red coat and blue trousers is jogging in place",
]
CLIPTokenizer = pytest.importorskip("transformers").CLIPTokenizer


@pytest.fixture(scope="module")
def spec():
    return train_tokenizer(CAPTIONS, 800)


@pytest.fixture(scope="module")
def tokenizer(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(spec, folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def test_words_of_the_captions_are_single_tokens(tokenizer):
    for caption in CAPTIONS:
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(caption)["input_ids"]) == len(words) + 2


def test_ids_are_those_of_the_vocabulary(spec, tokenizer):
    ids = vocabulary(spec)
    expected = [BOS, "a</w>", "man</w>", ",</w>", "red</w>", "coat</w>", EOS]
    assert tokenizer("a man, red coat")["input_ids"] == [ids[token] for token in expected]
    assert sorted(ids.values()) == list(range(len(ids)))


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60))
def test_no_text_is_out_of_vocabulary(tokenizer, text):
    """Every text becomes bytes at worst: known ids, and no byte of a word is lost."""
    text = text.replace(BOS, "").replace(EOS, "")
    encoded = tokenizer(text)["input_ids"]
    assert encoded[0] == tokenizer.bos_token_id
    assert encoded[-1] == tokenizer.eos_token_id
    inner = encoded[1:-1]
    assert all(0 <= i < tokenizer.bos_token_id for i in inner)
    tokens = tokenizer.convert_ids_to_tokens(inner)
    # One letter stands for one byte, so letters without end marks count the bytes.
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(normal)
    letters = "".join(token.removesuffix("</w>") for token in tokens)
    assert letters == "".join(piece for piece, _ in pieces)


def test_case_and_spaces_do_not_matter(tokenizer):
    assert tokenizer("A  RED\ncoat")["input_ids"] == tokenizer("a red coat")["input_ids"]


def test_empty_prompt_is_start_and_end(spec, tokenizer):
    size = len(vocabulary(spec))
    assert tokenizer("")["input_ids"] == [size - 2, size - 1]
    padded = tokenizer("", padding="max_length", max_length=77)["input_ids"]
    assert padded == [size - 2] + [size - 1] * 76


def test_training_does_not_depend_on_order(spec):
    shuffled = list(CAPTIONS)
    random.Random(1).shuffle(shuffled)
    assert train_tokenizer(shuffled, 800) == spec
    assert json.loads(json.dumps(spec)) == spec


def test_two_ways_to_one_token_share_an_id():
    ids = vocabulary({"kind": "bpe", "merges": ["a b", "b c", "ab c", "a bc"]})
    assert len(ids) == 512 + 3 + 2
    assert sorted(ids.values()) == list(range(len(ids)))


@pytest.mark.parametrize("size", [514, 530, 560])
def test_vocabulary_size_is_kept(size):
    assert len(vocabulary(train_tokenizer(CAPTIONS, size))) == size


def test_text_encoder_gets_the_vocabulary(spec):
    config = with_tokenizer(PUPPETS, spec)
    encoder = config.text_encoder
    ids = vocabulary(spec)
    assert (encoder.vocab_size, encoder.bos_token_id, encoder.eos_token_id) == (
        len(ids),
        ids[BOS],
        ids[EOS],
    )
    assert encoder.hidden_size == PUPPETS.text_encoder.hidden_size


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "words"}, "expected kind 'bpe' or 'clip', got 'words'"),
        ({"kind": "bpe"}, "expected a list of merges, got NoneType"),
        ({"kind": "bpe", "merges": ["a b", "abc"]}, "merges of two symbols, got 'abc'"),
        ({"kind": "bpe", "merges": ["ab c"]}, "merges of known symbols, got ab c"),
    ],
)
def test_bad_specifications_are_refused(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_tokenizer(bad, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 514, got 500"):
        train_tokenizer(CAPTIONS, 500)
