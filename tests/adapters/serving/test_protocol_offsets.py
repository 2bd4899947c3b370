"""``text_offset`` of completions: where each token stands in the text that is returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphabet_model import AlphabetModel
from paged_core import AsyncEngine, EngineConfig
from paged_serving import CompletionCall, ServedModel
from toy_tokenizers import ByteTokenizer, SentencePieceTokenizer


class ScriptedModel(AlphabetModel):
    """Says what the script has, whatever was said before."""

    script: Sequence[int] = ()
    num_prompt = 1

    def forward(self, token_ids, positions, attend, sample_indices):
        heads = torch.zeros(len(token_ids), 1, 16)
        attend(0, heads, heads, heads)
        places = (positions[sample_indices] + 1 - self.num_prompt).clamp(0, len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[places], self.spec.vocab_size) * 50.0


class Scripted:
    """A served model that says what it is told to."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.model = ScriptedModel(vocab_size=vocab_size)
        config = EngineConfig(num_blocks=256, attention_backend="reference", enable_prefix_caching=False)
        self.engine = AsyncEngine(self.model, tokenizer=tokenizer, config=config)
        self.served = ServedModel(self.engine, ["scripted"])

    def both(self, script: Sequence[int], **fields: Any) -> dict[str, Any]:
        """The choice of a plain answer, which a streamed one must come to."""
        body = {"prompt": "A", "max_tokens": len(script), "temperature": 0, "logprobs": 0, **fields}
        call = CompletionCall(body, self.served, "1")
        self.model.script, self.model.num_prompt = script, len(call.prompts[0].token_ids)
        (choice,) = call.answer([self.engine.submit(call.prompts[0], call.params).result(30)])["choices"]
        streamed = CompletionCall({**body, "stream": True}, self.served, "1")
        stream = self.engine.submit(streamed.prompts[0], streamed.params)
        pieces = [chunk["choices"][0] for delta in stream for chunk in streamed.chunks(0, delta)]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name in ("tokens", "text_offset", "token_logprobs"):
            assert [each for piece in pieces for each in piece["logprobs"][name]] == choice["logprobs"][name]
        return choice


@pytest.fixture(scope="module")
def bytewise() -> Iterator[Scripted]:
    tokenizer = ByteTokenizer()
    scripted = Scripted(tokenizer, tokenizer.size)
    with scripted.engine:
        yield scripted


@pytest.fixture(scope="module")
def pieces() -> Iterator[Scripted]:
    tokenizer = SentencePieceTokenizer()
    scripted = Scripted(tokenizer, len(tokenizer.pieces))
    with scripted.engine:
        yield scripted


def places(choice: dict[str, Any]) -> list[int]:
    return choice["logprobs"]["text_offset"]


def test_the_tokens_of_one_character_share_its_place(bytewise: Scripted) -> None:
    choice = bytewise.both(list("aéb日c".encode()))
    assert choice["text"] == "aéb日c"
    assert places(choice) == [0, 1, 1, 2, 3, 3, 3, 4]


def test_tokens_of_a_stop_string_that_is_cut_off_stand_at_the_end(bytewise: Scripted) -> None:
    choice = bytewise.both(list(b"abENDx"), stop=["END"])
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", list("abEND"))
    assert places(choice) == [0, 1, 2, 2, 2]
    kept = bytewise.both(list(b"abENDx"), stop=["END"], include_stop_str_in_output=True)
    assert (kept["text"], places(kept)) == ("abEND", [0, 1, 2, 3, 4])


def test_what_might_have_been_a_stop_string_keeps_its_places(bytewise: Scripted) -> None:
    choice = bytewise.both(list(b"abENEND"), stop=["ENDE"])
    assert (choice["text"], places(choice)) == ("abENEND", list(range(7)))
    choice = bytewise.both(list(b"abENxy"), stop=["END"])
    assert (choice["text"], places(choice)) == ("abENxy", list(range(6)))


def test_an_added_token_is_not_in_the_echoed_text(pieces: Scripted) -> None:
    tokenizer = pieces.tokenizer
    word = tokenizer.first_word
    choice = pieces.both([word + 3, word + 7], prompt="né", echo=True)  # <s>, three bytes; "ing" and ","
    assert choice["text"] == "néing,"
    assert choice["logprobs"]["tokens"][0] == "<s>"
    assert places(choice) == [0, 0, 1, 1, 2, 5]
    assert places(pieces.both([word + 3], prompt="né", echo=True, add_special_tokens=False)) == [0, 1, 1, 2]


def test_special_tokens_that_are_spelt_in_the_prompt_are_in_its_text(bytewise: Scripted) -> None:
    tokenizer = bytewise.tokenizer
    choice = bytewise.both(list(b"c"), prompt=[97, tokenizer.eos_token_id, 98], echo=True)
    assert choice["text"] == "a<eos>bc"
    assert places(choice) == [0, 1, 6, 7]


def test_the_end_token_stands_behind_the_text(bytewise: Scripted) -> None:
    choice = bytewise.both([97, bytewise.tokenizer.eos_token_id, 98])
    assert (choice["text"], places(choice)) == ("a", [0, 1])


TOKENS = st.lists(st.integers(0, ByteTokenizer().size - 2), min_size=1, max_size=30)
STOPS = st.lists(st.sampled_from(["END", "é", "ND", "\n", "a", " the", "日é", "ENDEND"]), max_size=3)


@settings(max_examples=60)
@given(script=TOKENS, stop=STOPS, echo=st.booleans(), include=st.booleans())
def test_text_between_two_places_is_what_a_token_completed(
    bytewise: Scripted, script: list[int], stop: list[str], echo: bool, include: bool
) -> None:
    prompt = [97, 0xE6, 0x97, 0xA5]
    fields: dict[str, Any] = {"stop": stop, "echo": echo, "include_stop_str_in_output": include, "prompt": prompt}
    choice = bytewise.both(script, **fields)
    offsets, text = places(choice), choice["text"]
    ids = [*(prompt if echo else ()), *script][: len(offsets)]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    own = ids[len(prompt) :] if echo else ids
    start = len("a日") if echo else 0
    for number, place in enumerate(offsets[len(ids) - len(own) :]):
        before = bytewise.tokenizer.decode(own[:number])
        whole = before.rstrip("�")
        assert start + len(whole) <= place <= start + len(before) or place == len(text)
