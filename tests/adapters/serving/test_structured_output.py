"""Answers that must follow a grammar, asked for in every protocol's spelling."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from calls import Alphabet
from paged_core import InvalidRequestError, SamplingParams
from paged_serving import (
    CallError,
    ChatCall,
    CompletionCall,
    Failure,
    ProtocolError,
    TGICall,
    compile_grammar,
    openai_error,
    tgi_error,
)
from paged_serving.grammars.form import JsonForm
from paged_serving.grammars.schemas import FORMATS
from paged_serving.grammars.spelling import spell

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


def complete(alphabet: Alphabet, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "A", "max_tokens": 80, "temperature": 0, **fields}
    return alphabet.answer(CompletionCall(body, alphabet.served, "1"))["choices"]


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "value": SCHEMA}},  # as huggingface_hub sends it
        {"response_format": {"type": "json", "value": SCHEMA}},  # TGI's
        {"response_format": {"type": "json_schema", "value": {"name": "person", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},  # llama.cpp's, and others'
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


@pytest.mark.parametrize(
    "asked",
    [
        {"structured_outputs": {"regex": "[a-c]{3}x?"}},
        {"guided_regex": "[a-c]{3}x?"},
        {"response_format": {"type": "regex", "value": "[a-c]{3}x?"}},
    ],
)
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
    compile_grammar(call)
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
    with pytest.raises(InvalidRequestError, match="guided_grammar: the grammar can't be used: Parser Error") as refused:
        compile_grammar(call)
    assert len(str(refused.value)) < 500


def test_a_preempted_row_finds_its_place_in_the_grammar_again() -> None:
    alphabet = Alphabet(max_num_seqs=32, block_size=4)
    pattern = "([a-z]{3}[0-9]{3}){8}"
    asked = {"structured_outputs": {"regex": pattern}, "temperature": 40, "n": 4, "seed": 1, "max_tokens": 60}
    with alphabet.engine:
        calls = [CompletionCall({"prompt": "A" * 40 + c, **asked}, alphabet.served, c) for c in "ABCDEFGHIJKLMNOP"]
        for call in calls:
            compile_grammar(call)
        streams = [alphabet.engine.submit(call.prompts[0], call.params) for call in calls]
        outputs = [output for stream in streams for output in stream.result(60).outputs]
        stats = alphabet.engine.engine.last_stats
    assert all(re.fullmatch(pattern, output.text) for output in outputs)
    assert stats is not None
    assert stats.total_preemptions > 0


def test_several_prompts_follow_the_grammar_each_by_itself(alphabet: Alphabet) -> None:
    body = {"prompt": ["A", "ABCDEFGH", "AB"], "max_tokens": 9, "temperature": 40, "seed": 1, "n": 2}
    answer = alphabet.answer(CompletionCall({**body, "guided_regex": "[a-c][0-9]{3}"}, alphabet.served, "1"))
    assert all(re.fullmatch("[a-c][0-9]{3}", choice["text"]) for choice in answer["choices"])
    assert len(answer["choices"]) == 6


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"const": 2**53 + 1}, "const"),
        ({"enum": [1, {"a": [-(2**63)]}]}, "enum"),
        ({"type": "integer", "maximum": 2**53 + 1}, "maximum"),
        ({"properties": {"default": {"anyOf": [{"exclusiveMinimum": 10**22}]}}}, "exclusiveMinimum"),
        ({"$defs": {"x": {"const": 123456789.123456789}}}, "const"),
        ({"items": {"multipleOf": 1e300}}, "multipleOf"),
    ],
)
def test_numbers_that_would_not_be_followed_exactly_are_refused(
    alphabet: Alphabet, schema: dict[str, Any], keyword: str
) -> None:
    for asked in (schema, json.dumps(schema)):
        with pytest.raises(ProtocolError, match=f"{keyword} holds .* exact") as refused:
            complete(alphabet, guided_json=asked)
        assert refused.value.param == "guided_json"


@pytest.mark.parametrize("number", [2**53, -(2**53), 0, 1.5, 1e-7, 123.456789012345])
def test_numbers_that_are_exact_come_as_they_are(alphabet: Alphabet, number: float) -> None:
    schema = {"const": number, "default": 2**60, "examples": [2**70]}
    (choice,) = complete(alphabet, guided_json=schema)
    assert json.loads(choice["text"]) == number


def test_keys_of_patterns_that_are_used_up_are_not_waited_for(alphabet: Alphabet) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^a$": {"maximum": 9}, "^[bc]$": {"const": 1}, "^d(e|f)$": {"const": 2}},
        "additionalProperties": False,
        "required": ["a"],
    }
    sampled: dict[str, Any] = {"temperature": 40, "max_tokens": 150}
    for seed in range(20):
        (choice,) = complete(
            alphabet, structured_outputs={"json": schema, "disable_any_whitespace": True}, **sampled, seed=seed
        )
        found = json.loads(choice["text"])
        assert found.keys() <= {"a", "b", "c", "de", "df"}
        assert found["a"] <= 9


def test_white_space_is_bounded_and_as_it_is_asked_for(alphabet: Alphabet) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    loves_spaces = {"logit_bias": {"0": 100}, "max_tokens": 200}
    (choice,) = complete(alphabet, guided_json=schema, **loves_spaces)
    assert choice["finish_reason"] == "stop", "it does not go on with spaces for ever"
    assert json.loads(choice["text"]) == {"a": 1}
    (choice,) = complete(alphabet, structured_outputs={"json": schema, "disable_any_whitespace": True}, **loves_spaces)
    assert choice["text"] == '{"a":1}'
    for asked in (
        {"structured_outputs": {"json": schema, "whitespace_pattern": "[ ]{0,2}"}},
        {"guided_json": schema, "guided_whitespace_pattern": "[ ]{0,2}"},
    ):
        (choice,) = complete(alphabet, **asked, **loves_spaces)
        assert choice["text"] == '{  "a"  :  1  }'
    both = {"json": schema, "disable_any_whitespace": True, "whitespace_pattern": " "}
    with pytest.raises(ProtocolError, match="disable_any_whitespace"):
        complete(alphabet, structured_outputs=both)


def test_formats_that_nobody_knows_are_annotations(alphabet: Alphabet) -> None:
    for name in ("credit-card", "int64", "idn-email"):
        (choice,) = complete(alphabet, guided_json={"type": "string", "format": name, "const": "abc"})
        assert choice["text"] == '"abc"'
    (choice,) = complete(alphabet, guided_json={"type": "string", "format": "date"}, max_tokens=20)
    assert re.fullmatch('"[0-9]{4}-[0-9]{2}-[0-9]{2}"', choice["text"])
    for name in FORMATS:
        complete(alphabet, guided_json={"type": "string", "format": name}, max_tokens=1)


@pytest.mark.parametrize(
    ("grammar", "said", "unsaid"),
    [
        ('start "a"', "guided_grammar", "GBNF"),
        ('start: "a', "lexer error", "GBNF"),
        ('root: "a"', "start", "GBNF"),
        ("root ::= nothing", "GBNF.*nothing", "start"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_told_in_its_own_terms(
    alphabet: Alphabet, grammar: str, said: str, unsaid: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as refused:
        complete(alphabet, guided_grammar=grammar)
    assert unsaid not in str(refused.value)


@pytest.mark.parametrize(
    ("expression", "ascii_only", "elsewhere"),
    [
        (r"GO\d\d", ["GO11"], ["GO𝟻1", "GO١١"]),
        (r"[\d.]+", ["1.5"], ["١.٥"]),
        (r"\w+", ["a_Z9"], ["ä", "я"]),
        (r"[^\w]\s\S", ["! b", "ä\tб"], ["a b", "!\u2003b"]),
        (r"\D\W", ["ab"[:1] + "!"], ["1!", "ab"]),
        (r"\\d[\]\d]", ["\\d]", "\\d7"], ["\\٧"]),
    ],
)
def test_classes_of_an_expression_are_asciis(expression: str, ascii_only: list[str], elsewhere: list[str]) -> None:
    """As ``re.ASCII`` has them: a post code of mathematical digits is none."""
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    for text in (*ascii_only, *elsewhere):
        matcher = llguidance.LLMatcher(tokenizer, spell("regex", expression, JsonForm()))
        taken = matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
        assert taken is (re.fullmatch(expression, text, re.ASCII) is not None) is (text in ascii_only), text


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
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "text", "value": {}}}, "response_format"),
        ({"response_format": {"type": "regex", "value": {}}}, "response_format.value"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "json", "value": SCHEMA, "schema": SCHEMA}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "shape": 1}}},
            "response_format.json_schema.shape",
        ),
        ({"guided_regex": "(" * 5000 + ")" * 5000}, "guided_regex"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_grammar": "start: nothing_there"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "guided_regex"),
    ],
)
def test_a_structure_that_cannot_be_followed_is_refused_by_its_name(
    alphabet: Alphabet, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        complete(alphabet, **asked)
    assert refused.value.param == param


def test_without_llguidance_the_way_out_is_told(alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ProtocolError, match=r"paged-core\[server\]"):
        complete(alphabet, guided_regex="a")
