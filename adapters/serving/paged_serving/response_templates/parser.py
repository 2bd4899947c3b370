"""Parses an answer with a response template: text to events."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from paged_serving.conversation.events import (
    ArgumentsDelta,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from paged_serving.conversation.turns import Tool
from paged_serving.response_templates.casting import cast
from paged_serving.response_templates.contents import ENDS_ITSELF, read, transformed
from paged_serving.response_templates.scanner import Scanner, Segment
from paged_serving.response_templates.template import REASONING, Field, ResponseTemplate

_LETTERS = string.ascii_letters + string.digits


def new_id() -> str:
    """A new call id: nine letters and digits, the form that every chat template accepts (Mistral's requires it)."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


class TemplateParser:
    """A ``conversation.reader.Parser``. Texts lose the white space around them. A call that can't be read is text.

    Args:
        prompt: its end may be the beginning of the answer.
        tools: what can be called: arguments that are written without types get those of the parameters.
        silent: special tokens, left out where they are no markers.
    """

    def __init__(
        self, template: ResponseTemplate, prompt: str, *, tools: Sequence[Tool] = (), silent: Sequence[str] = ()
    ) -> None:
        self._scanner = Scanner(template, silent)
        self._parameters = {tool.name: tool.parameters or {} for tool in tools}
        self._texts = {field.name: _Stripped(field) for field in template.fields}
        self._told: Mapping[str, Callable[[str], Event]] = {
            "content": TextDelta, **dict.fromkeys(REASONING, ReasoningDelta)
        }  # fmt: skip
        self._body: list[str] = []  # of the call that is being written
        self._groups: dict[str, str] = {}
        self._open: Field | None = None
        self._num_calls = 0
        for segment in self._scanner.feed(template.begun(prompt)):
            list(self._events(segment))
        for text in self._texts.values():
            text.forget()

    def feed(self, text: str) -> Iterator[Event]:
        for segment in self._scanner.feed(text):
            yield from self._events(segment)

    def finish(self, *, cut: bool) -> Iterator[Event]:
        for segment in self._scanner.finish(cut=cut):
            yield from self._events(segment)
        if self._open is not None:
            yield from self._last_call(cut)

    def _events(self, segment: Segment) -> Iterator[Event]:
        field = segment.of
        if field is None:
            return
        if field.name == "tool_calls":
            yield from self._of_call(field, segment)
        elif field.name in self._told:
            text = self._texts[field.name].take(segment)
            if text:
                yield self._told[field.name](text)

    def _of_call(self, field: Field, segment: Segment) -> Iterator[Event]:
        self._open = field
        self._groups.update(segment.groups)
        if segment.kind == "text":
            self._body.append(segment.text)
        elif segment.kind == "close":
            yield from self._calls(lost=False)

    def _last_call(self, cut: bool) -> Iterator[Event]:
        """A last call that nothing closed: it is complete if the model ended there, or if it could not continue."""
        assert self._open is not None, "a call has a field"
        yield from self._calls(lost=cut) if not cut or self._open.content in ENDS_ITSELF else ()

    def _calls(self, *, lost: bool) -> Iterator[Event]:
        """``lost``: what can't be read isn't told."""
        field, text, groups = self._open, "".join(self._body), self._groups
        assert field is not None, "a call has a field"
        self._open, self._body, self._groups = None, [], {}
        try:
            calls = [self._call(each) for each in _values(field, text, groups)]
        except (ValueError, TypeError, KeyError):
            told = "" if lost else self._texts["content"].whole(text) if "content" in self._texts else text.strip()
            if told:
                yield TextDelta(told)
            return
        for name, arguments in calls:
            index, self._num_calls = self._num_calls, self._num_calls + 1
            yield ToolCallStart(index, new_id(), name)
            yield ArgumentsDelta(index, arguments)
            yield ToolCallEnd(index)

    def _call(self, value: Any) -> tuple[str, str]:
        """(name, JSON text of the arguments).

        Raises:
            ValueError: it is no call.
        """
        function = value.get("function", value) if isinstance(value, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not name.strip() or not isinstance(arguments, Mapping):
            raise ValueError("a call needs a name, and an object of arguments")
        name = name.strip()
        typed = cast(arguments, self._parameters.get(name, {}))
        return name, json.dumps(typed, ensure_ascii=False, allow_nan=False)


def _values(field: Field, text: str, groups: Mapping[str, str]) -> Iterable[Any]:
    """All calls that a field's text holds."""
    content = read(field.content, text, field.content_args)
    if field.transform is None:
        found = content
    elif field.transform_each:
        if not isinstance(content, list):
            raise ValueError("it is no list")
        found = [transformed(field.transform, {**groups, **_object(each), "content": each}) for each in content]
    else:
        found = transformed(field.transform, {**groups, "content": content})
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise ValueError("there is no call")
    return calls


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


class _Stripped:
    """A field's text without the white space around it, as it comes. Between its parts stands ``join``; where a
    template has none, what stood there."""

    def __init__(self, field: Field) -> None:
        self._strip = field.content_args.get("strip", True)
        self._join = field.join
        self._begun = False
        self._fresh = True  # of a part nothing was told yet
        self._held = ""

    def take(self, segment: Segment) -> str:
        """What can be told now."""
        if segment.kind != "text":
            if self._join is not None:
                self._fresh, self._held = True, self._join if self._begun else ""
            return ""
        return self._more(segment.text)

    def whole(self, text: str) -> str:
        """A text that turned out to belong here."""
        return self._more(text)

    def forget(self) -> None:
        """White space that was said before isn't told again."""
        self._held = ""

    def _more(self, text: str) -> str:
        if not self._strip:
            return text
        if not self._begun or (self._join is not None and self._fresh):
            text = text.lstrip()
            if not text:
                return ""
        self._begun, self._fresh = True, False
        text = self._held + text
        told = text.rstrip()
        self._held = text[len(told) :]
        return told
