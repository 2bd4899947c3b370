"""Answers as models write them, by response template: the text, and its parsed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from paged_serving.conversation.events import Answer
from paged_serving.conversation.reader import Parser
from paged_serving.conversation.turns import Tool
from paged_serving.response_templates.parser import TemplateParser
from paged_serving.response_templates.selection import known


class Written(NamedTuple):
    """One answer of a template's models."""

    template: str
    text: str
    content: str
    reasoning: str
    calls: list[tuple[str, dict[str, Any]]]
    prompt: str = ""


TOOLS = [
    Tool(
        "get_weather", "", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    ),
    Tool("add", "", {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}),
]
PARIS, TWO = {"city": "Paris", "days": 2}, {"a": 1, "b": 2.5}
_PARIS, _TWO = '{"city": "Paris", "days": 2}', '{"a": 1, "b": 2.5}'
BOTH = [("get_weather", PARIS), ("add", TWO)]
HERMES = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {_PARIS}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "add", "arguments": {_TWO}}}\n</tool_call>'
)
LIST = f'[{{"name": "get_weather", "arguments": {_PARIS}}}, {{"name": "add", "arguments": {_TWO}}}]'
PYTHON = 'get_weather(city="Paris", days=2)', "add(a=1, b=2.5)"
XML = "".join(
    f"<tool_call>\n<function={name}>\n"
    + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    + "</function>\n</tool_call>\n"
    for name, arguments in BOTH
)
GLM = "".join(
    f"<tool_call>{name}\n"
    + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
    + "</tool_call>\n"
    for name, arguments in BOTH
)
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    f"{_PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{_TWO}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_31 = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{_PARIS}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{_TWO}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    f"{_PARIS}<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{_TWO}<|tool_call_end|>"
    "<|tool_calls_section_end|>"
)
HARMONY = (
    "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    f"{_PARIS}<|call|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{_TWO}"
)
GEMMA = (
    '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|><|tool_call>call:add{a:1,b:2.5}<tool_call|>'
)
WRITTEN = [
    Written("hermes", f"I look.\n{HERMES}<|im_end|>", "I look.", "", BOTH),
    Written("hermes", f"<think>\nHm.\n</think>\n\n{HERMES}", "", "Hm.", BOTH),
    Written("hermes", "Hm.\n</think>\n\nYes.", "Yes.", "Hm.", [], "<|im_start|>assistant\n<think>\n"),
    Written("hermes", "Yes.", "Yes.", "", [], "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    Written("hermes", "  a < b  \n", "a < b", "", []),
    Written("qwen3-xml", f"<think>Hm.</think>I look.\n\n{XML}", "I look.", "Hm.", BOTH),
    Written("gemma4", f"<|channel>thought\nHm.<channel|>{GEMMA}<|tool_response>", "", "Hm.", BOTH),
    Written("gemma4", "Hello.<turn|>", "Hello.", "", []),
    Written(
        "llama3-json",
        f'{{"name": "get_weather", "parameters": {_PARIS}}}; {{"name": "add", "parameters": {_TWO}}}',
        "", "", BOTH,
    ),
    Written("llama3-json", f'<|python_tag|>{{"type": "function", "name": "add", "parameters": {_TWO}}}<|eom_id|>',
            "", "", [("add", TWO)]),
    Written("llama3-json", 'Like this: {"name": "add"}', 'Like this: {"name": "add"}', "", []),
    Written("llama4-pythonic", f"<|python_start|>[{', '.join(PYTHON)}]<|python_end|>", "", "", BOTH),
    Written("llama4-pythonic", f"[{', '.join(PYTHON)}]", "", "", BOTH),
    Written("mistral", f"[TOOL_CALLS] {LIST}", "", "", BOTH),
    Written("mistral", "Well [TOOL", "Well [TOOL", "", []),
    Written("mistral-args", f"Now.[TOOL_CALLS]get_weather[ARGS]{_PARIS}[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{_TWO}",
            "Now.", "", BOTH),
    Written("mistral-args", "[THINK]Hm.[/THINK]Yes.", "Yes.", "Hm.", []),
    Written("deepseek", f"Hm.\n</think>\n\nI look.{DEEPSEEK}", "I look.", "Hm.", BOTH, "<｜Assistant｜><think>\n"),
    Written("deepseek-v31", f"I look.{DEEPSEEK_31}", "I look.", "", BOTH, "<｜Assistant｜></think>"),
    Written("gpt-oss", HARMONY, "One moment.", "I look it up.", BOTH, "<|start|>assistant"),
    Written("gpt-oss", "<|channel|>final<|message|>Yes.", "Yes.", "", [], "<|start|>assistant"),
    Written("granite3", f"<|tool_call|>{LIST}", "", "", BOTH),
    Written("granite3", "<think>Hm.</think><response>Yes.</response>", "Yes.", "Hm.", []),
    Written("granite4", HERMES, "", "", BOTH),
    Written("phi4-mini", f"<|tool_call|>{LIST}<|/tool_call|>", "", "", BOTH),
    Written("phi4", "<think>Hm.</think>\nYes.", "Yes.", "Hm.", []),
    Written("olmo3", f"<think>Hm.</think>I look.\n<function_calls>\n{PYTHON[0]}\n{PYTHON[1]}\n</function_calls>",
            "I look.", "Hm.", BOTH),
    Written("glm4", f"<think>Hm.</think>\n{GLM}", "", "Hm.", BOTH),
    Written("kimi-k2", f"I look.{KIMI}", "I look.", "", BOTH),
    Written("lfm2", f"<|tool_call_start|>[{', '.join(PYTHON)}]<|tool_call_end|>I looked.", "I looked.", "", BOTH),
]  # fmt: skip


def parser_of(written: Written, silent: Sequence[str] = ()) -> TemplateParser:
    return TemplateParser(known()[written.template], written.prompt, tools=TOOLS, silent=silent)


def read_in(parser: Parser, pieces: Sequence[str], *, cut: bool = False) -> Answer:
    answer = Answer()
    for piece in pieces:
        answer.add(parser.feed(piece))
    return answer.add(parser.finish(cut=cut))


def told(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the parts of an answer, without the random ids."""
    return answer.text, answer.reasoning, [(call.name, call.arguments) for call in answer.tool_calls]
