"""``top_logprobs`` of /v1/completions, which are keyed by text: no token hides another, whatever their texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from alphabet_model import AlphabetModel
from paged_core import AsyncEngine, EngineConfig
from paged_serving import ChatCall, CompletionCall, ServedModel
from toy_tokenizers import ByteTokenizer


class TwoAs(ByteTokenizer):
    """Token 0xC0, a byte of no text, reads as a second "A"."""

    def _bytes(self, token: int, skip: bool) -> bytes:
        return b"A" if token == 0xC0 else super()._bytes(token, skip)

    def convert_ids_to_tokens(self, token: int) -> str:
        return "A" if token == 0xC0 else super().convert_ids_to_tokens(token)


class Fixed:
    """A served model that finds the same tokens the likeliest at each place."""

    def __init__(self) -> None:
        tokenizer = TwoAs()
        self.model = _FixedModel(vocab_size=tokenizer.size)
        config = EngineConfig(num_blocks=64, attention_backend="reference", enable_prefix_caching=False)
        self.engine = AsyncEngine(self.model, tokenizer=tokenizer, config=config)
        self.served = ServedModel(self.engine, ["fixed"])

    def logprobs(self, likeliest: Sequence[int], **fields: Any) -> dict[str, Any]:
        """Of the first token of an answer."""
        self.model.likeliest = likeliest
        body = {"prompt": "x", "max_tokens": 1, "temperature": 0, **fields}
        call = CompletionCall(body, self.served, "1")
        (choice,) = call.answer([self.engine.submit(call.prompts[0], call.params).result(30)])["choices"]
        return dict(choice["logprobs"])


class _FixedModel(AlphabetModel):
    likeliest: Sequence[int] = ()

    def forward(self, token_ids, positions, attend, sample_indices):
        heads = torch.zeros(len(token_ids), 1, 16)
        attend(0, heads, heads, heads)
        logits = torch.full((len(sample_indices), self.spec.vocab_size), -20.0)
        logits[:, list(self.likeliest)] = torch.arange(len(self.likeliest), 0, -1.0)
        return logits


@pytest.fixture(scope="module")
def fixed() -> Iterator[Fixed]:
    fixed = Fixed()
    with fixed.engine:
        yield fixed


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_parts_of_characters_have_names_of_their_own(fixed: Fixed, num: int) -> None:
    found = fixed.logprobs([0xF0, 0x9F, 0x61, 0x98], logprobs=num)
    names = [r"bytes:\xf0", r"bytes:\x9f", "a", r"bytes:\x98"]
    (top,) = found["top_logprobs"]
    assert list(top) == names[:num]
    assert sorted(top.values(), reverse=True) == list(top.values())
    assert found["tokens"] == names[:1]
    assert found["token_logprobs"] == [top[names[0]]]


def test_tokens_may_be_called_by_their_ids(fixed: Fixed) -> None:
    """vLLM's ``return_tokens_as_token_ids``."""
    found = fixed.logprobs([0x41, 0xC0], logprobs=2, return_tokens_as_token_ids=True)
    assert (found["tokens"], list(found["top_logprobs"][0])) == (["token_id:65"], ["token_id:65", "token_id:192"])
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "temperature": 0, "logprobs": True}
    call = ChatCall({**body, "return_tokens_as_token_ids": True}, fixed.served, "1")
    (choice,) = call.answer([fixed.engine.submit(call.prompts[0], call.params).result(30)])["choices"]
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["bytes"], choice["message"]["content"]) == ("token_id:65", [65], "A")


def test_of_tokens_with_equal_text_the_chosen_one_keeps_it(fixed: Fixed) -> None:
    found = fixed.logprobs([0x41, 0xC0, 0x42], logprobs=3)
    (top,) = found["top_logprobs"]
    assert list(top) == ["A", "token_id:192", "B"]
    assert found["token_logprobs"] == [top["A"]]
    found = fixed.logprobs([0x41, 0xC0, 0x42], logprobs=2, allowed_token_ids=[0xC0])
    (top,) = found["top_logprobs"]
    assert list(top) == ["A", "token_id:65"]
    assert found["token_logprobs"] == [top["A"]] and top["A"] < top["token_id:65"]


def test_a_chosen_token_that_is_none_of_the_likeliest_comes_on_top_of_them(fixed: Fixed) -> None:
    found = fixed.logprobs([0x41, 0x42, 0x43], logprobs=2, allowed_token_ids=[0x9F])
    (top,) = found["top_logprobs"]
    assert list(top) == [r"bytes:\x9f", "A", "B"]


def test_no_more_come_than_were_asked_for_where_several_are_equally_likely(fixed: Fixed) -> None:
    # All but "A" are as likely as each other, and five of each place were fetched.
    found = fixed.logprobs([0x41], prompt="xy", echo=True, logprobs=2, prompt_logprobs=5)
    assert [len(top) for top in found["top_logprobs"][1:]] == [2, 2]
    assert list(found["top_logprobs"][1]) == ["y", "A"]


def test_the_prompts_tokens_are_named_alike(fixed: Fixed) -> None:
    found = fixed.logprobs([0x9F, 0x98], prompt=[0x61, 0xF0, 0x9F], echo=True, logprobs=2)
    assert found["tokens"] == ["a", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x9f"]
    first, second, third, answer = found["top_logprobs"]
    assert first is None
    assert list(second) == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98"]
    assert list(third) == list(answer) == [r"bytes:\x9f", r"bytes:\x98"]
    for token, value, top in zip(found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:],
                                 strict=True):  # fmt: skip
        assert top[token] == value
