"""Answers read by response templates: what each of ours makes of what its models write, whole or in pieces."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from many_pieces import split_differently
from paged_core import AsyncEngine, ConfigError, EngineConfig
from paged_serving import ServedModel
from paged_serving.conversation.events import Answer, ToolCallEnd, ToolCallStart
from paged_serving.conversation.turns import Tool
from paged_serving.response_templates.contents import read
from paged_serving.response_templates.parser import TemplateParser
from paged_serving.response_templates.scanner import LONGEST
from paged_serving.response_templates.selection import given, known, of_model
from paged_serving.response_templates.template import TemplateError, load
from response_texts import BOTH, DEEPSEEK, HERMES, TOOLS, WRITTEN, Written, parser_of, read_in, told
from tiny_folder import byte_tokenizer

IM = "<|im_start|>assistant\n"


@pytest.mark.parametrize("written", WRITTEN, ids=lambda each: each.template)
def test_what_models_write_is_text_reasoning_and_calls(written: Written) -> None:
    answer = read_in(parser_of(written), [written.text])
    calls = [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
    assert (answer.text, answer.reasoning, calls) == (written.content, written.reasoning, written.calls)


def test_every_template_of_ours_is_tried() -> None:
    assert {each.template for each in WRITTEN} == set(known())


@pytest.mark.parametrize("name", sorted(known()))
def test_the_pieces_that_a_text_comes_in_change_nothing(name: str) -> None:
    """``make pieces`` tries 10,000 texts for each template."""
    split_differently(name, random.Random(name), 300)


@pytest.mark.parametrize("written", [each for each in WRITTEN if each.calls], ids=lambda each: each.template)
def test_an_answer_that_is_cut_anywhere_tells_whole_calls_and_no_marker(written: Written) -> None:
    whole = read_in(parser_of(written), [written.text])
    for end in range(len(written.text)):
        answer = read_in(parser_of(written), [written.text[:end]], cut=True)
        _, _, calls = told(answer)
        assert calls == told(whole)[2][: len(calls)]
        assert whole.reasoning.startswith(answer.reasoning)
        assert whole.text.startswith(answer.text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1', '{"name": "add", "arguments": {"a": 1'),
        ("Well.\n<tool_call>no call</tool_call>\nSorry.", "Well.no call\nSorry."),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', '{"name": 3, "arguments": {}}'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', '{"name": "add", "arguments": [1]}'),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', '{"name": "add", "arguments": {"a": NaN}}'),
    ],
)
def test_a_call_that_cannot_be_read_is_text_without_its_markers(text: str, content: str) -> None:
    answer = read_in(TemplateParser(known()["hermes"], "", tools=TOOLS), [text])
    assert (answer.text, answer.tool_calls) == (content, [])


def test_a_model_that_ends_without_the_last_marker_has_called_all_the_same() -> None:
    text = HERMES.removesuffix("\n</tool_call>")
    calls = told(read_in(TemplateParser(known()["hermes"], "", tools=TOOLS), [text]))[2]
    assert [(name, json.loads(arguments)) for name, arguments in calls] == BOTH


def test_special_tokens_are_left_out_where_they_mark_nothing() -> None:
    parser = TemplateParser(known()["hermes"], IM, silent=["<|x|>", "<tool_call>"])
    answer = read_in(parser, ["a<|x", "|>b ", '<tool_call>{"name": "f", "arguments": {}}', "</tool_call>"])
    assert told(answer) == ("ab", "", [("f", "{}")])


def test_what_the_prompt_begins_is_not_told_again() -> None:
    parser = TemplateParser(known()["hermes"], f"<think>old</think>{IM}<think>\nI had ")
    assert told(read_in(parser, ["more", " to say.</think>Yes."])) == ("Yes.", "more to say.", [])


def test_each_event_of_a_call_comes_once_and_ids_differ() -> None:
    events = [*TemplateParser(known()["hermes"], "").feed(HERMES)]
    starts = [each for each in events if isinstance(each, ToolCallStart)]
    assert [each.index for each in starts] == [0, 1] == [each.index for each in events if isinstance(each, ToolCallEnd)]
    assert len({each.id for each in starts}) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", each.id) for each in starts)


def test_arguments_without_types_get_those_of_their_parameters() -> None:
    properties = {
        "text": {"type": "string"}, "num": {"type": "integer"}, "share": {"type": ["number", "null"]},
        "on": {"type": "boolean"}, "list": {"anyOf": [{"type": "array"}, {"type": "null"}]}, "free": {},
    }  # fmt: skip
    values = {"text": "7", "num": "7.0", "share": "null", "on": "True", "list": "[1]", "free": "7", "other": "7"}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>"
    parser = TemplateParser(known()["qwen3-xml"], IM, tools=[Tool("f", "", {"properties": properties})])
    ((_, arguments),) = told(read_in(parser, [text]))[2]
    wanted = {"text": "7", "num": 7, "share": None, "on": True, "list": [1], "free": "7", "other": "7"}
    assert json.loads(arguments) == wanted


@pytest.mark.parametrize(
    ("content", "text", "args", "value"),
    [
        ("json", '{a: <|"|>x "y"<|"|>, "b: c": [1]}', {"unquoted_keys": True, "string_delims": [['<|"|>'] * 2]},
         {"a": 'x "y"', "b: c": [1]}),
        ("json", "no", {"allow_non_json": True}, "no"),
        ("kv-lines", "a: 1\nno\nb:2", {}, {"a": "1", "b": "2"}),
        ("kv-lines", "a: 1", {"value_parser": {"name": "int"}}, {"a": 1}),
        ("xml-inline", "<a>1<b>2<a>3<a>4", {"tag_pattern": "<(?P<key>.)>(?P<value>.)", "merge_duplicates": True},
         {"a": ["1", "3", "4"], "b": "2"}),
        ("python-call-list", "[a.b(x=[-1, {'k': None}], y=true)]", {},
         [{"name": "a.b", "arguments": {"x": [-1, {"k": None}], "y": True}}]),
        ("bool", " True ", {}, True),
        ("text", " a ", {"strip": False}, " a "),
    ],
)  # fmt: skip
def test_contents_are_read_as_transformers_declares_them(content: str, text: str, args: Any, value: Any) -> None:
    assert read(content, text, args) == value


@pytest.mark.parametrize(
    "text", ["f(1)", "f(**a)", "[f(a=g())]", "x = f(a=1)", "f(a=b)", "f(", "f(a=1)(b=2)", "[" * 999]
)
def test_what_is_no_call_in_python_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        read("python-call-list", text, {})


# ---- templates ---------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"start_anchor": "A:", "fields": {"content": {"content": "text"}}}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"fields": {}}, "fields"),
        ({"version": 2}, "version is 2"),
        ({"x": 1}, "the template has x; known are"),
        ({"start_anchor": ""}, "aren't empty"),
        ({"start_anchor": None}, "aren't empty"),
        ({"fields": {"a": {}, "b": {}}}, "more than one field"),
        ({"fields": {"a": {"open": "<", "open_pattern": "<"}}}, "not both"),
        ({"fields": {"a": {"open_pattern": "("}}}, "no expression"),
        ({"fields": {"a": {"content": "yaml"}}}, "there are text"),
        ({"fields": {"a": {"sometimes": 1}}}, "'a' has sometimes"),
        ({"fields": {"a": {"join": 1}}}, "join must be a text"),
    ],
)
def test_what_is_no_template_is_refused_with_the_part_that_is_wrong(wrong: Any, why: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(why)):
        load({**GOOD, **wrong}, "mine")


@pytest.mark.parametrize("name", known())
def test_a_piece_costs_the_same_however_long_the_text_is_before(name: str) -> None:
    """White space may be the beginning of most markers, and models may write it without an end."""
    call = next((each.text for each in WRITTEN if each.template == name and each.calls and not each.prompt), "")
    for unit in (" ", "<", '{"a": '):
        parser = TemplateParser(known()[name], "", tools=TOOLS)
        answer = Answer()
        for _ in range(600):
            answer.add(parser.feed(unit * 10))
            assert len(parser._scanner._text) <= 4 * LONGEST, "what was told is forgotten"
        pieces = told(answer.add(parser.feed(call)).add(parser.finish(cut=False)))
        assert pieces == told(read_in(TemplateParser(known()[name], "", tools=TOOLS), [unit * 6000 + call]))


def test_a_template_is_given_by_name_or_as_a_file(tmp_path: Path) -> None:
    assert given("hermes") is known()["hermes"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    assert [field.name for field in given(str(path)).fields] == ["content"]
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"mine\.json can't be used: a response template is an object"):
        given(str(path))
    with pytest.raises(ConfigError, match=r"known here: deepseek, .*, qwen3-xml"):
        given(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("<|im_start|> <tool_call>", "hermes"),
        ("<|im_start|> <tool_call> <function= <parameter=", "qwen3-xml"),
        ("[INST] [TOOL_CALLS]", "mistral"),
        ("[INST] [TOOL_CALLS] [ARGS]", "mistral-args"),
        (f"<｜Assistant｜> {DEEPSEEK} </think> thinking", "deepseek"),
        ("<｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁sep｜> </think> thinking", "deepseek-v31"),
        ('<|start_header_id|> <|eot_id|> ipython {"name": "f", "parameters": {}}', "llama3-json"),
        ("<|start_header_id|> <|eot_id|> ipython <function=f> parameters", None),
        ("<|im_start|>", None),
        ("", None),
    ],
)
def test_ours_are_known_by_the_marks_in_the_chat_template(source: str, name: str | None) -> None:
    found = of_model(None, source)
    assert (found.name if found else None) == name


def test_the_tokenizers_own_comes_first_and_must_be_right() -> None:
    found = of_model(GOOD, "<|im_start|> <tool_call>")
    assert found is not None and found.name == "the tokenizer's own"
    with pytest.raises(ConfigError, match="the tokenizer's response template can't be used: its version is 3"):
        of_model({**GOOD, "version": 3}, "")


def test_a_chat_template_without_reasoning_has_none() -> None:
    plain, thinking = of_model(None, "<|im_start|> <tool_call>"), of_model(None, "<|im_start|> <tool_call> <think>")
    assert plain is not None and plain.reasoning is None
    assert thinking is not None and thinking.reasoning is not None


@pytest.mark.parametrize(("reasoning", "reasons"), [(None, False), (True, True), (False, False)])
def test_a_template_of_ours_that_is_named_reads_reasoning_where_the_chat_template_knows_it(
    tmp_path: Path, reasoning: bool | None, reasons: bool
) -> None:
    """Else --tool-call-parser hermes would refuse expressions, and let what follows a schema think to the end."""
    tokenizer = byte_tokenizer()  # its chat template has no marks at all
    own = tmp_path / "own.json"
    thought = {"reasoning_content": {"open": "<think>", "close": "</think>"}}
    own.write_text(json.dumps({**GOOD, "fields": {**GOOD["fields"], **thought}}))
    with AsyncEngine(AlphabetModel(vocab_size=257), tokenizer=tokenizer, config=EngineConfig(num_blocks=8)) as engine:
        served = ServedModel(engine, ["model"], response_template="hermes", reasoning=reasoning)
        assert served.response_template is not None and served.response_template.calls is not None
        assert (served.response_template.reasoning is not None) is reasons
        trusted = ServedModel(engine, ["model"], response_template=str(own), reasoning=reasoning).response_template
        assert trusted is not None and (trusted.reasoning is None) is (reasoning is False)
