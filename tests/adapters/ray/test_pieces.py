"""PieceCodec: what it tells of a text's beginning is what the tokenizer tells of the whole."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from paged_core import TextCodec
from paged_ray.pieces import PieceCodec

WORDS = ["ship", "sea", "12", "it's", "Ünder", "日本", "\n\n", "  two", "a", "water,", "END", "<s>", "way home"]


def bpe(pre_tokenizer) -> PreTrainedTokenizerFast:
    """One that was trained to merge what it can; special tokens go before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=30)) + " Once men went to sea" for _ in range(50)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.num_seen = tokenizer, 0

    def __deepcopy__(self, memo: object) -> Counting:
        return self

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_seen += len(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


@pytest.fixture(scope="module")
def by_words() -> PreTrainedTokenizerFast:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="module")
def across_words() -> PreTrainedTokenizerFast:
    return bpe(pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


@pytest.mark.parametrize("kind", ["by_words", "across_words"])
@pytest.mark.parametrize("special", [False, True])
def test_what_a_text_begins_with_is_told_as_of_the_whole_and_more_of_it_each_time(kind, special, request):
    tokenizer = request.getfixturevalue(kind)
    plain, piecewise, rng = TextCodec(tokenizer), PieceCodec(tokenizer), random.Random(1)
    text = ""
    for _ in range(12):
        text += " ".join(rng.choices(WORDS, k=rng.randrange(400)))
        whole = plain.encode(text, special)
        for _ in range(20):
            told = piecewise.encode(text, special)
            assert told == whole[: len(told)]
            assert len(told) + piecewise.take_unread() == pytest.approx(len(whole), rel=0.3)
        assert told == whole
    assert len(text) > 8000


def test_only_what_is_new_of_a_conversation_is_tokenised_and_little_of_that(by_words):
    tokenizer = Counting(by_words)
    codec = PieceCodec(tokenizer)
    so_far = " ".join(f"word and {number} of many" for number in range(1000))
    before = tokenizer.num_seen
    codec.encode(so_far, False)
    assert 1500 < tokenizer.num_seen - before < 3000
    while codec.take_unread():
        codec.encode(so_far, False)
    before = tokenizer.num_seen
    codec.encode(so_far + " and what do you say now", False)
    assert tokenizer.num_seen - before < 700


def test_a_tokenizer_that_joins_words_is_given_whole_texts(across_words):
    tokenizer = Counting(across_words)
    codec = PieceCodec(tokenizer)
    before = tokenizer.num_seen
    for _ in range(2):
        codec.encode("sea water " * 200, False)
    assert tokenizer.num_seen - before == 2 * 2000
