"""SamplingParams: what is of the wrong type is told where they are made, and costs nobody else a thing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from paged_core import LLM, AsyncEngine, Engine, EngineConfig, InvalidRequestError, SamplingParams, hookimpl
from toy_tokenizers import CharacterTokenizer

CONFIG = EngineConfig(num_blocks=256, attention_backend="reference")
GOOD = SamplingParams(temperature=0, max_tokens=5)
LONE = "\ud800"
LISTS = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logits_processors")
JUNK: list[Any] = [
    None, True, 0, 5, -1, 2.5, float("nan"), 10**400, 1j, "", "x", LONE, b"x", object(), len, iter([3]), {1},
    [], [1], [None], ["x"], [LONE], [[]], [[1]], [b"x"], [len],
    {}, {3: 5.0}, {3: None}, {"3": 1}, {3: 10**400}, {3: float("inf")},
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cache_salt": 5}, "cache_salt is 5; it must be a str that can be written as UTF-8"),
        ({"cache_salt": LONE}, "cache_salt is '.ud800'; it must be a str that can"),
        ({"stop": [LONE]}, "stop holds '.ud800'; each item must be a str that can"),
        ({"stop": ["a", ""]}, "stop holds ''; each item must be .* not empty"),
        ({"stop": b"x"}, "stop is b'x'; it must be a list"),
        ({"bad_words": ["a", 1]}, "bad_words holds 1; each item must be a str"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list, each item a token id"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12'; it must be a list"),
        ({"stop_token_ids": ["12"]}, "stop_token_ids holds '12'; each item must be a token id"),
        ({"bad_words_token_ids": [3]}, "bad_words_token_ids holds 3; each item must be a sequence of token ids"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids holds 1.0; each item must be a token id"),
        ({"logits_processors": len}, "logits_processors is .*; it must be a list, each item a function"),
        ({"logits_processors": [1]}, "logits_processors holds 1; each item must be a function"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]; it must be a dict, token id -> number"),
        ({"logit_bias": {"3": 1}}, "logit_bias holds '3': 1; it must be a dict, token id -> number"),
        ({"logit_bias": {3: None}}, "logit_bias holds 3: None; it must be a dict, token id -> number"),
        ({"temperature": None}, "temperature is None; it must be a number from 0 to"),
        ({"n": None}, "n is None; it must be a number from 1 to"),
        ({"top_k": None}, "top_k is None; it must be a number from 0 to"),
        ({"min_tokens": None}, "min_tokens is None; it must be a number from 0 to"),
        ({"seed": 1.0}, "seed is 1.0; it must be an integer"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; it must be True or False"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_refused_by_its_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        SamplingParams(**given)


def test_no_nucleus_is_refused_only_where_something_is_drawn() -> None:
    for greedy in ({"temperature": 0}, {"top_k": 1}):
        assert SamplingParams(top_p=0, **greedy) == SamplingParams(**greedy)
    for drawn in ({}, {"temperature": 0.5}, {"temperature": None}):
        with pytest.raises(InvalidRequestError, match=r"top_p is 0|temperature is None"):
            SamplingParams(top_p=0, **drawn)


def test_none_stands_for_an_empty_list_as_vllms_users_write_it() -> None:
    assert SamplingParams(**dict.fromkeys(LISTS)) == SamplingParams()
    assert SamplingParams(seed=None, max_tokens=None, logprobs=None, prompt_logprobs=None, logit_bias=None)


def test_lists_are_taken_as_they_are_now() -> None:
    given = [3]
    params = SamplingParams(stop_token_ids=given, stop="x", bad_words="y", allowed_token_ids=iter([4, 5]))
    given.append(None)  # type: ignore[arg-type]
    assert (params.stop_token_ids, params.stop, params.bad_words, params.allowed_token_ids) == (
        (3,), ("x",), ("y",), (4, 5),
    )  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_no_value_of_any_field_harms_another_request(name: str) -> None:
    """Refused where they are made, or by the engine, or served: the other request and the engine never notice."""
    with AsyncEngine(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        for value in JUNK:
            try:
                odd = SamplingParams(**{"n": 2, "max_tokens": 3, name: value})
                stream = engine.submit([33] * 40, odd)
            except InvalidRequestError:
                continue
            good = engine.submit("A", GOOD)
            try:
                stream.result(30)
            except InvalidRequestError as error:
                assert name in str(error) or name == "n"
            assert good.result(30).outputs[0].text == "BCDEF"
        assert engine.alive


class Plugin:
    @hookimpl
    def create_logits_processor(self, request: Any) -> Any:
        if request.num_prompt > 1:
            raise LookupError("not with me")


def test_a_plugin_that_raises_for_one_prompt_ends_that_one_only() -> None:
    llm = LLM(Engine(AlphabetModel(), CONFIG, plugins=[Plugin()]), tokenizer=CharacterTokenizer())
    good, bad, odd, last = llm.generate(["A", "AB", LONE, "B"], GOOD)
    assert [output.outputs[0].text for output in (good, last)] == ["BCDEF", "CDEFG"]
    assert bad.outputs[0].finish_reason == odd.outputs[0].finish_reason == "error"
    assert "could not be taken in: LookupError('not with me')" in bad.error
    assert "can't be written as UTF-8" in odd.error
    assert llm.generate("A", GOOD)[0].outputs[0].text == "BCDEF"
    llm.close()
