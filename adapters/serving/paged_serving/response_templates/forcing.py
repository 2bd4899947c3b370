"""Grammars for answers that call tools, made from the response template: Lark, as llguidance reads it. They force
complete calls, whose arguments follow the tool's JSON schema. If calls are optional, text is free until a call begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from paged_core import InvalidRequestError
from paged_serving.conversation.turns import Tool, ToolChoice
from paged_serving.grammars.form import JsonForm
from paged_serving.grammars.spelling import json_rule
from paged_serving.response_templates.casting import types_of
from paged_serving.response_templates.scanner import Scanner
from paged_serving.response_templates.template import Field, ResponseTemplate, TemplateError
from paged_serving.response_templates.writing import Writing, writing

_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANYTHING: Mapping[str, Any] = {"type": "object"}
_PLAIN_STRING = frozenset({"type", "enum", "const", "title", "description", "default", "examples", "nullable", "anyOf"})
_FIRST_RULE = 6  # the line that it stands on: behind the terminals and the start
_TERMINALS = r"""%llguidance {}
TEXT: /(\n|.)*/
SPACE: /[ \n]{0,2}/
INSIDE: /[^<\x00-\x08]*/
"""


class SchemaError(InvalidRequestError):
    """The parameters of ``tool`` can't be followed."""

    def __init__(self, tool: Tool, why: str) -> None:
        super().__init__(f"the parameters of {tool.name} can't be followed: {why}")
        self.tool = tool


class CallGrammar:
    """One answer's. ``tools_by_line`` tells whose schema a line of its text holds, once there is one.

    Args:
        prompt: its end may be the beginning of the answer.
        special: tokens that no text can spell, by their texts.
    """

    def __init__(self, template: ResponseTemplate, prompt: str, special: Mapping[str, int]) -> None:
        self._template, self._prompt, self._special = template, prompt, special
        self._pieces = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._rules: list[str] = []
        self.tools_by_line: dict[int, Tool] = {}

    def text(self, tools: Sequence[Tool], choice: ToolChoice, otherwise: str | None) -> str:
        """The grammar.

        Args:
            tools: what may be called; none: there is ``otherwise``.
            otherwise: what an answer without calls must be, as a rule says it; None: any text.

        Raises:
            TemplateError: the template doesn't say how calls are written, or can't hold a tool's arguments.
            SchemaError: a tool's schema can't be followed.
        """
        start = self._start(tools, choice, otherwise)
        return "\n".join([_TERMINALS + f"start: {start}", *self._rules, ""])

    def _start(self, tools: Sequence[Tool], choice: ToolChoice, otherwise: str | None) -> str:
        said = self._said(otherwise)
        if not tools:
            return f"{self._thinking()} SPACE {said}"
        calls = _Calls(self, _calls_of(self._template), tools, forced=choice.mode == "required")
        if choice.mode == "required":
            return f"{self._thinking()} SPACE {calls.all(choice.parallel)}"
        if otherwise is not None or self._template.implicit is None:
            return f"{self._thinking()} SPACE ({calls.all(choice.parallel)} | {said})"
        return f"{self._thinking()} {calls.in_text(choice.parallel)}"

    def _said(self, otherwise: str | None) -> str:
        """An answer without calls, with the markers that it needs where all has markers."""
        said = "TEXT" if otherwise is None else self.rule(otherwise)
        field = next((each for each in self._template.fields if each.name == "content"), None)
        if field is None or field.open is None:
            return said
        how = writing(field)
        return f"{self.literal(how.open)} {said} {self.literal(how.close)}"

    def _thinking(self) -> str:
        """Reasoning that may or must come first; empty if the prompt ends it already."""
        field = self._template.reasoning
        if field is None:
            return ""
        scanner = Scanner(self._template)
        parts = list(scanner.feed(self._template.begun(self._prompt)))
        how = writing(field)
        if scanner.field is field:
            return self.until(how.close)
        done = any(part.of is field for part in parts)
        return "" if done else f"(SPACE {self.literal(how.open)} {self.until(how.close)})?"

    # ---- bits of grammars ----------------------------------------------------------------------------------------

    def rule(self, right: str) -> str:
        """The name of a new rule."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}: {right}")
        return name

    @contextmanager
    def of(self, tool: Tool) -> Iterator[None]:
        """Rules that are added meanwhile hold what ``tool`` declares."""
        begun = len(self._rules)
        yield
        self.tools_by_line |= dict.fromkeys(range(_FIRST_RULE + begun, _FIRST_RULE + len(self._rules)), tool)

    def literal(self, text: str) -> str:
        """``text``, with special tokens as such."""
        found, place = [], 0
        for special in self._pieces.finditer(text):
            found += [json.dumps(text[place : special.start()], ensure_ascii=False), f"<[{self._special[special[0]]}]>"]
            place = special.end()
        found.append(json.dumps(text[place:], ensure_ascii=False))
        return " ".join(piece for piece in found if piece != '""')

    def until(self, text: str) -> str:
        """Any text, and then ``text``."""
        special = self._pieces.search(text)
        if special is not None and special.start() == 0:
            return f"TEXT {self.literal(text)}"
        first = text if special is None else text[: special.start()]
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: TEXT {self.literal(first)}")
        return f"{name} {self.literal(text[len(first) :])}"

    def json(self, schema: Mapping[str, Any]) -> str:
        return self.rule(json_rule(schema, JsonForm()))


class _Calls:
    """Calls of ``tools`` as ``field`` reads them. ``forced``: arguments follow all schemas, not only the strict."""

    def __init__(self, grammar: CallGrammar, field: Field, tools: Sequence[Tool], *, forced: bool) -> None:
        self._grammar, self._field, self._forced = grammar, field, forced
        self._how: Writing = writing(field)
        self._tools = tools

    def all(self, several: bool) -> str:
        """One call or more, from the first marker on."""
        literal, rest = self._grammar.literal, self._grammar.rule(self._rest(several))
        call = f"{literal(self._how.trigger)} {rest}"
        again = f"(SPACE {call})*" if several and self._repeats else ""
        return f"{literal(self._how.before)} {call} {again}"

    def in_text(self, several: bool) -> str:
        """Optional calls: text ends only with the answer or at the beginning of a call."""
        if not self._how.trigger:  # a call is the whole answer
            return f"SPACE ({self.all(several)} | /[^{{\\[ \\n](\\n|.)*/)?"
        call = self._grammar.rule(f"{self._begun()} {self._rest(several)}")
        if several and self._repeats:
            return f"{call}* TEXT"
        return f"({call} SPACE | TEXT)"  # text behind the one call might hold another

    def _begun(self) -> str:
        """Any text, and then the trigger."""
        before = self._grammar.literal(self._how.before)
        if before.startswith("<"):  # a special token, which no text holds
            return f"TEXT ({before})? {self._grammar.until(self._how.trigger)}"
        return self._grammar.until(self._how.trigger)

    @property
    def _repeats(self) -> bool:
        """Whether calls stand one after another, each between markers of its own."""
        return bool(self._how.close) and not self._how.in_list

    def _rest(self, several: bool) -> str:
        """A call, or a list of them, behind the trigger."""
        close, after = self._grammar.literal(self._how.close), self._how.after.lstrip()
        space = "SPACE" if after != self._how.after else ""
        if not self._how.in_list:
            each = [
                self._grammar.rule(f"{self._grammar.literal(after.replace('{name}', tool.name))} {self._body(tool)}")
                for tool in self._tools
            ]
            return f"{space} ({' | '.join(each)}) SPACE {close}"
        item = self._grammar.rule(" | ".join(self._grammar.rule(self._body(tool)) for tool in self._tools))
        lines = bool(self._field.content_args.get("lines"))
        if lines or self._field.content_args.get("several"):
            between = r'"\n"' if lines else '"; "'
            items = f"{item} ({between} {item})*" if several else item
            return f"{space} {items} SPACE {close}"
        items = f'{item} ("," SPACE {item})*' if several else item
        return f'"[" SPACE {items} SPACE "]" SPACE {close}'

    def _body(self, tool: Tool) -> str:
        """A call without its markers. Raises SchemaError."""
        try:
            with self._grammar.of(tool):
                return self._call(tool, self._schema(tool))
        except SchemaError:
            raise
        except InvalidRequestError as error:
            raise SchemaError(tool, str(error)) from error

    def _call(self, tool: Tool, schema: Mapping[str, Any]) -> str:
        literal = self._grammar.literal
        if self._field.content == "python-call-list":
            arguments = self._one_by_one(schema, tool, "{key}={value}", ", ")
            return " ".join([literal(f"{tool.name}("), arguments, literal(")")])
        if self._how.argument is not None:
            return self._one_by_one(schema, tool, self._how.argument, "")
        if self._field.content != "json":
            raise TemplateError(f"calls written as {self._field.content} can't be forced")
        arguments = self._grammar.json(schema)
        if self._how.name_key is None and self._how.arguments_key is None:
            return arguments
        name = [] if self._how.name_key is None else [f"{json.dumps(self._how.name_key)}: {json.dumps(tool.name)}"]
        before = ", ".join([*name, f"{json.dumps(self._how.arguments_key)}: "])
        return " ".join([literal("{" + before), arguments, literal("}")])

    def _schema(self, tool: Tool) -> Mapping[str, Any]:
        """Of the arguments. Nothing is added to what is declared, unless that is allowed by name."""
        if not (self._forced or tool.strict) and self._field.content == "json":
            return _ANYTHING
        if tool.parameters is None:
            return _NOTHING
        closed = {} if {"additionalProperties", "patternProperties"} & tool.parameters.keys() else _CLOSED
        return {"type": "object", **(closed if "properties" in tool.parameters else {}), **tool.parameters}

    def _one_by_one(self, schema: Mapping[str, Any], tool: Tool, form: str, between: str) -> str:
        """Arguments written each for itself, in the order of their declaration; those that aren't required may lack."""
        properties = list((schema.get("properties") or {}).items())
        required = set(schema.get("required") or ())
        if missing := required - {name for name, _ in properties}:
            raise SchemaError(tool, f"{', '.join(sorted(missing))} is required, and not declared")
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        rest = {False: self._grammar.rule('""'), True: self._grammar.rule('""')}  # by whether one stands before
        for name, declared in reversed(properties):
            begin, end = form.replace("{key}", name).split("{value}")
            value = self._value(declared, shared, tool, name)
            literal = self._grammar.literal
            written = self._grammar.rule(" ".join([literal(begin), value, literal(end)]))
            with_it = {False: f"{written} {rest[True]}", True: f"{literal(between)} {written} {rest[True]}"}
            rest = {
                before: self._grammar.rule(each if name in required else f"{each} | {rest[before]}")
                for before, each in with_it.items()
            }
        return rest[False]

    def _value(self, declared: Any, shared: Mapping[str, Any], tool: Tool, name: str) -> str:
        """In tags a text stands as it is; all else as JSON."""
        if self._how.argument is None or "string" not in types_of(declared, shared):
            return self._grammar.json({**shared, **(declared if isinstance(declared, Mapping) else {})})
        if "enum" in declared or "const" in declared:
            values = declared.get("enum", [declared.get("const")])
            return "(" + " | ".join(self._grammar.literal(str(each)) or '""' for each in values) + ")"
        if beyond := sorted(declared.keys() - _PLAIN_STRING):
            told = "which can't be forced on texts in tags, as this model writes them"
            raise SchemaError(tool, f"{name} has {', '.join(beyond)}, {told}")
        return "INSIDE"


_CLOSED: Mapping[str, Any] = {"additionalProperties": False}


def _calls_of(template: ResponseTemplate) -> Field:
    assert template.calls is not None, "tools need a template with calls"
    return template.calls
