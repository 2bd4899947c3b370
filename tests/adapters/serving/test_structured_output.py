"""Answers that must follow a grammar, asked for in every protocol's spelling."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from calls import Alphabet
from paged_serving import (
    CallError,
    ChatCall,
    CompletionCall,
    Failure,
    ProtocolError,
    TGICall,
    openai_error,
    tgi_error,
)
from paged_serving.grammar import GrammarProcessor

from paged_core import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NO_SPACES = {"0": -100}  # the model has no preference among what is allowed, and JSON allows spaces everywhere


@pytest.fixture(scope="module")
def alphabet() -> Iterator[Alphabet]:
    alphabet = Alphabet()
    with alphabet.engine:
        yield alphabet


def complete(alphabet: Alphabet, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "A", "max_tokens": 80, "temperature": 0, **fields}
    return alphabet.answer(CompletionCall(body, alphabet.served, "1"))["choices"]


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
)
def test_answers_follow_a_json_schema(alphabet: Alphabet, asked: dict[str, Any]) -> None:
    (choice,) = complete(alphabet, logit_bias=NO_SPACES, **asked)
    person = json.loads(choice["text"])
    assert person.keys() == {"name", "age"}
    assert isinstance(person["age"], int)
    assert choice["finish_reason"] == "stop"


def test_any_object_will_do_for_json_mode(alphabet: Alphabet) -> None:
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        (choice,) = complete(alphabet, logit_bias={"0": -100, "3": -100, "2": -100}, max_tokens=200, **asked)
        assert choice["text"].startswith("{")


@pytest.mark.parametrize("asked", [{"structured_outputs": {"regex": "[a-c]{3}x?"}}, {"guided_regex": "[a-c]{3}x?"}])
def test_answers_follow_an_expression(alphabet: Alphabet, asked: dict[str, Any]) -> None:
    (choice,) = complete(alphabet, **asked)  # the model would say B; of what is allowed it says a, and goes on
    assert re.fullmatch("abcx?", choice["text"])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


@pytest.mark.parametrize("field", ["structured_outputs", "guided_choice"])
def test_answers_are_one_of_the_choices(alphabet: Alphabet, field: str) -> None:
    choices = ["no", 'yes, "sure"', "maybe\\"]
    asked: Any = {field: {"choice": choices} if field == "structured_outputs" else choices}
    found = {choice["text"] for choice in complete(alphabet, n=16, temperature=60, seed=2, **asked)}
    assert found <= set(choices)
    assert len(found) > 1


def test_answers_follow_a_written_grammar(alphabet: Alphabet) -> None:
    for grammar in ('start: ("ab" | "cd") "!"', 'root ::= ("ab" | "cd") "!"'):
        (choice,) = complete(alphabet, structured_outputs={"grammar": grammar})
        assert choice["text"] in ("ab!", "cd!")


def test_every_sample_follows_the_grammar_by_itself(alphabet: Alphabet) -> None:
    choices = complete(alphabet, n=24, temperature=40, seed=1, structured_outputs={"regex": "[a-z]{4}-[0-9]{3}"})
    texts = [choice["text"] for choice in choices]
    assert all(re.fullmatch("[a-z]{4}-[0-9]{3}", text) for text in texts)
    assert len(set(texts)) > 12


def test_states_that_fell_out_are_made_again(alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_serving.grammar._STATES_PER_ROW", 0.25)
    choices = complete(alphabet, n=8, temperature=40, seed=1, structured_outputs={"regex": "([a-z][0-9]){4}"})
    assert all(re.fullmatch("([a-z][0-9]){4}", choice["text"]) for choice in choices)


def test_a_long_answer_keeps_no_more_of_its_grammar_than_a_short_one(
    alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[GrammarProcessor] = []

    def make(*args: Any) -> GrammarProcessor:
        made.append(GrammarProcessor(*args))
        return made[-1]

    monkeypatch.setattr("paged_serving.grammar.GrammarProcessor", make)
    choices = complete(alphabet, n=3, temperature=40, seed=1, max_tokens=100, guided_regex="([a-z][0-9]){60}")
    assert all(re.fullmatch("([a-z][0-9])+", choice["text"]) for choice in choices)
    (processor,) = made
    assert len(processor._states) <= 6


def test_thousands_of_choices_are_no_trouble(alphabet: Alphabet) -> None:
    choices = [f"x{number}" for number in range(5000)]
    (choice,) = complete(alphabet, guided_choice=choices, temperature=40, seed=3)
    assert choice["text"] in choices


@pytest.mark.parametrize(
    "bans",
    [
        {"allowed_token_ids": [80]},
        {"bad_words": ["a"]},
        {"guided_regex": "a", "min_tokens": 5},
        {"guided_regex": None, "allowed_token_ids": [65], "bad_words": ["a"]},
    ],
)
def test_a_structure_and_bans_that_leave_nothing_are_that_requests_own_fault(
    alphabet: Alphabet, bans: dict[str, Any]
) -> None:
    other = alphabet.engine.submit("A", SamplingParams(max_tokens=150, temperature=0, ignore_eos=True))
    call = CompletionCall({"prompt": "A", "guided_regex": "aa", "max_tokens": 9, **bans}, alphabet.served, "1")
    result = alphabet.engine.submit(call.prompts[0], call.params).result(30)
    assert [output.finish_reason for output in result.outputs] == ["error"]
    error = CallError(Failure.GENERATION, result.error or "")
    status, body = openai_error(error)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert "no token is left" in body["error"]["message"]
    assert tgi_error(error)[0] == 422
    assert other.result(30).outputs[0].finish_reason == "length"


def test_a_grammar_too_tangled_to_follow_is_refused_shortly(alphabet: Alphabet) -> None:
    rules = " | ".join(f'"x{number}"' for number in range(3000))
    call = CompletionCall({"prompt": "A", "guided_grammar": f"start: {rules}", "temperature": 40}, alphabet.served, "1")
    result = alphabet.engine.submit(call.prompts[0], call.params).result(30)
    status, body = openai_error(CallError(Failure.GENERATION, result.error or ""))
    assert status == 400
    assert "can't be followed" in body["error"]["message"]
    assert len(body["error"]["message"]) < 500


def test_a_preempted_row_finds_its_place_in_the_grammar_again() -> None:
    alphabet = Alphabet(max_num_seqs=32, block_size=4)
    pattern = "([a-z]{3}[0-9]{3}){8}"
    asked = {"structured_outputs": {"regex": pattern}, "temperature": 40, "n": 4, "seed": 1, "max_tokens": 60}
    with alphabet.engine:
        calls = [CompletionCall({"prompt": "A" * 40 + c, **asked}, alphabet.served, c) for c in "ABCDEFGHIJKLMNOP"]
        streams = [alphabet.engine.submit(call.prompts[0], call.params) for call in calls]
        outputs = [output for stream in streams for output in stream.result(60).outputs]
        stats = alphabet.engine.engine.last_stats
    assert all(re.fullmatch(pattern, output.text) for output in outputs)
    assert stats is not None
    assert stats.total_preemptions > 0


def test_chats_and_tgis_route_follow_it_too(alphabet: Alphabet) -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "response_format": {"type": "json_object"}}
    call = ChatCall({**body, "max_tokens": 30, "logit_bias": NO_SPACES}, alphabet.served, "1")
    assert alphabet.answer(call)["choices"][0]["message"]["content"].startswith("{")
    for grammar in (
        {"type": "regex", "value": "[a-c]{3}"},
        {"type": "json", "value": {"const": "abc"}},
        {"type": "json_schema", "value": {"name": "x", "schema": {"const": "abc"}}},
    ):
        parameters = {"grammar": grammar, "max_new_tokens": 40}
        answer = alphabet.answer(TGICall({"inputs": "A", "parameters": parameters}, alphabet.served, False))
        assert answer["generated_text"].strip('"') == "abc"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"const": 1}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "shape": 1}}}, "response_format"),
        ({"guided_regex": "(" * 5000 + ")" * 5000}, "guided_regex"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_grammar": "start: nothing_there"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "guided_regex"),
        ({"guided_regex": "a", "prompt": ["A", "B"]}, "guided_regex"),
    ],
)
def test_a_structure_that_cannot_be_followed_is_refused_by_its_name(
    alphabet: Alphabet, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(ProtocolError) as refused:
        complete(alphabet, **asked)
    assert refused.value.param == param


def test_without_llguidance_the_way_out_is_told(alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ProtocolError, match=r"paged-core\[server\]"):
        complete(alphabet, guided_regex="a")
