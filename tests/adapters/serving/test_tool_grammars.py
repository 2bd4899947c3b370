"""Answers that must call tools: random walks through the grammar of each response template, read back."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import pytest

from paged_serving.conversation.events import Answer
from paged_serving.conversation.turns import Tool, ToolChoice
from paged_serving.grammars.compiling import Vocabulary, compile_grammar, make_tokenizer
from paged_serving.grammars.form import JsonForm
from paged_serving.grammars.reasons import why
from paged_serving.grammars.sources import Sources
from paged_serving.grammars.spelling import spell
from paged_serving.response_templates.forcing import CallGrammar, SchemaError
from paged_serving.response_templates.parser import TemplateParser
from paged_serving.response_templates.selection import known
from paged_serving.response_templates.template import ResponseTemplate, TemplateError, load
from response_texts import read_in

EOS = 256
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>",
           "<|tool_call|>", "<｜tool▁calls▁begin｜>"]  # fmt: skip
IDS = {text: EOS + 1 + number for number, text in enumerate(SPECIAL)}
VOCABULARY = Vocabulary(
    [*(bytes([byte]) for byte in range(256)), b"<eos>", *(text.encode() for text in SPECIAL)],
    [EOS],
    [EOS, *IDS.values()],
)
TOKENIZER = make_tokenizer(VOCABULARY)
PLAIN = [*range(32, 127), 10, *range(EOS, EOS + 1 + len(SPECIAL))]
SHORT, DAYS = {"type": "string", "enum": ["Paris", "Rome"]}, {"type": "integer", "maximum": 20}
TOOLS = [
    Tool("get_weather", "", {"type": "object", "properties": {"city": SHORT, "days": DAYS},
                             "required": ["city"]}, strict=True),
    Tool("switch", "", {"type": "object", "properties": {"on": {"$ref": "#/$defs/On"}, "at": {"type": "boolean"}},
                        "required": ["on"], "$defs": {"On": {"type": "boolean"}}}, strict=True),
    Tool("stop", strict=True),
]  # fmt: skip
WITH_CALLS = [name for name, template in sorted(known().items()) if template.calls is not None]


def grammar_of(template: ResponseTemplate, mode: Any, prompt: str, parallel: bool = True, otherwise: Any = None) -> str:
    choice = ToolChoice(mode, parallel=parallel)
    return spell("grammar", CallGrammar(template, prompt, IDS).text(TOOLS, choice, otherwise), JsonForm())


def walk(grammar: str, chance: random.Random, begin: str = "") -> str | None:
    """What one of those says who choose at random, after ``begin``; None: it became too long."""
    matcher = compile_grammar(TOKENIZER, grammar)
    assert not matcher.is_error(), why(matcher)
    assert matcher.consume_tokens(list(begin.encode())), "it begins so"
    said = bytearray(begin.encode())
    for _ in range(500):
        bias = matcher.compute_logit_bias()
        allowed = [token for token in PLAIN if bias[token]] or [token for token in range(len(bias)) if bias[token]]
        if not allowed or allowed == [EOS] or (EOS in allowed and chance.random() < 0.4):
            return said.decode()
        token = chance.choice([token for token in allowed if token != EOS])
        assert matcher.consume_tokens([token])
        said += VOCABULARY.tokens[token]
    return None


def valid_calls(answer: Answer) -> list[str]:
    """The names of what is called, once all arguments have been seen to follow their schemas."""
    schemas = {tool.name: tool.parameters or {"type": "object", "maxProperties": 0} for tool in TOOLS}
    for call in answer.tool_calls:
        jsonschema_rs.validate(schemas[call.name], json.loads(call.arguments))
    return [call.name for call in answer.tool_calls]


def answers(grammar: str, template: ResponseTemplate, prompt: str, num: int, begin: str = "") -> Sequence[Answer]:
    chance = random.Random(template.name)
    said = [text for _ in range(num) if (text := walk(grammar, chance, begin)) is not None]
    assert said, "all became too long"
    return [read_in(TemplateParser(template, prompt, tools=TOOLS), [text]) for text in said]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", WITH_CALLS)
def test_who_must_call_calls_validly(name: str, parallel: bool) -> None:
    template, prompt = known()[name], "<|start|>assistant" if name == "gpt-oss" else ""
    for answer in answers(grammar_of(template, "required", prompt, parallel), template, prompt, 12):
        assert answer.text == ""
        called = valid_calls(answer)
        assert len(called) >= 1 if parallel else len(called) == 1


@pytest.mark.parametrize("begin", ["", "Well.\n<tool_call>", "<think>Hm.</think><tool_call>  "])
def test_who_may_call_speaks_freely_or_calls_validly(begin: str) -> None:
    template = known()["hermes"]
    for answer in answers(grammar_of(template, "auto", ""), template, "", 10, begin):
        assert len(valid_calls(answer)) >= ("<tool_call>" in begin)


def test_text_holds_no_second_call_where_one_is_allowed() -> None:
    grammar = grammar_of(known()["hermes"], "auto", "", parallel=False)
    matcher = compile_grammar(TOKENIZER, grammar)
    call = b'<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert matcher.consume_tokens([*b"Well.", *call])
    assert matcher.is_accepting()
    assert not matcher.compute_logit_bias()[ord("<")]


def test_what_was_begun_to_be_thought_is_thought_to_its_end() -> None:
    template, prompt = known()["hermes"], "<|im_start|>assistant\n<think>\n"
    for answer in answers(grammar_of(template, "required", prompt), template, prompt, 3, "Hm.</think>"):
        assert answer.reasoning == "Hm."
        assert valid_calls(answer)


@pytest.mark.parametrize("name", ["hermes", "gpt-oss"])
def test_who_does_not_call_says_what_was_asked_for(name: str) -> None:
    template, prompt = known()[name], "<|start|>assistant" if name == "gpt-oss" else ""
    found = answers(grammar_of(template, "auto", prompt, otherwise='"yes" | "no"'), template, prompt, 25)
    assert {answer.text for answer in found} <= {"yes", "no", ""}
    assert all(bool(valid_calls(answer)) is (answer.text == "") for answer in found)
    assert {bool(answer.text) for answer in found} == {True, False}


def test_a_strangers_template_is_forced_by_its_markers() -> None:
    spec = {
        "start_anchor": "A:",
        "fields": {
            "tool_calls": {"open_pattern": r"\s*<call:(?P<name>\w+)>\s*", "close": "</call>", "content": "json",
                           "transform": {"function": {"name": "{name}", "arguments": "{content}"}}},
            "content": {},
        },
    }  # fmt: skip
    template = load(spec, "a stranger's")
    for answer in answers(grammar_of(template, "required", "A:"), template, "A:", 5):
        assert valid_calls(answer)
    spec["fields"]["tool_calls"]["open_pattern"] = r"<(?:call|do):(?P<name>\w+)>"
    with pytest.raises(TemplateError, match='can\'t be told from its expressions; give it "written"'):
        grammar_of(load(spec, "a stranger's"), "required", "A:")


def test_what_tags_cannot_hold_is_refused_by_its_name() -> None:
    tool = Tool("f", "", {"properties": {"x": {"type": "string", "pattern": "^a$"}}})
    with pytest.raises(
        SchemaError, match="of f can't be followed: x has pattern, which can't be forced on texts in tags"
    ):
        CallGrammar(known()["glm4"], "", IDS).text([tool], ToolChoice("required"), None)


def test_of_several_tools_the_one_with_a_bad_schema_is_told() -> None:
    tools = [Tool("good", "", {}), Tool("bad", "", {"properties": {"x": {"minimum": 2**60}}})]
    with pytest.raises(SchemaError, match="the parameters of bad can't be followed: ") as refused:
        CallGrammar(known()["hermes"], "", IDS).text(tools, ToolChoice("required"), None)
    assert refused.value.tool is tools[1]


@pytest.mark.parametrize("name", ["hermes", "glm4", "llama4-pythonic"])
def test_every_line_of_a_schema_is_known_as_its_tools(name: str) -> None:
    tools = [Tool(each, "", {"properties": {each: {"type": "integer"}}}) for each in ("first", "second")]
    grammar = CallGrammar(known()[name], "", IDS)
    lines = grammar.text(tools, ToolChoice("required"), None).split("\n")
    of = {name: [lines[line - 1] for line, tool in grammar.tools_by_line.items() if tool.name == name]
          for name in ("first", "second")}  # fmt: skip
    assert of["first"] and of["second"], "both have rules"
    assert any("%json" in line for line in of["first"])
    assert not any("second" in line for line in of["first"]) and not any("first" in line for line in of["second"])


def test_what_is_wrong_is_told_of_the_line_where_it_stands() -> None:
    sources = Sources("1\n2: %json {}\n3: %json {}", {2: "first", 3: "second"})
    told = "the grammar can't be used: at 3(9): failed to compile JSON schema: no such type\n   2 | rule_0: %json {"
    assert sources.blamed(told) == ("second", "the grammar can't be used: no such type")
    assert sources.blamed("it takes too long") == (None, "it takes too long")
    assert list(sources.schemas()) == [("first", "start: %json {}"), ("second", "start: %json {}")]
