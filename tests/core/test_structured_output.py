"""Answers that must follow a grammar, asked for in every protocol's spelling."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from calls import Alphabet

from paged_core import ChatCall, CompletionCall, ProtocolError, TGICall

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
    monkeypatch.setattr("paged_core.grammar._MAX_STATES", 2)
    choices = complete(alphabet, n=8, temperature=40, seed=1, structured_outputs={"regex": "([a-z][0-9]){4}"})
    assert all(re.fullmatch("([a-z][0-9]){4}", choice["text"]) for choice in choices)


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
