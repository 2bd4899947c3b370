"""Response templates: how an assistant's message is written, as transformers declares it (``response_template``).

A template has fields, each with its opening and closing markers (texts or expressions), the format of its content
(``content``) and a ``transform``. One field may have no opening marker: all other text belongs to it. ``start_anchor``
is the text before the assistant's message in a prompt. See transformers' documentation of chat response parsing; the
format
is its version 1. Ours may also say of which chat templates it is (``chat_template_has``: texts that all stand in those)
and how a field is written (``written``: "open", "close", and of arguments in tags "argument").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex

from paged_serving.response_templates.contents import CONTENTS

_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern", "chat_template_has", "models"}
_FIELD_KEYS = {
    "open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional",
    "transform", "transform_each", "written",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of its field


class TemplateError(ValueError):
    """An invalid response template; the message says which part is wrong."""


@dataclass(frozen=True)
class Marker:
    """What opens or closes a field."""

    pattern: regex.Pattern[str]
    source: str  # the expression
    is_final: bool  # a text: once it is there, what follows can't change it
    texts: Sequence[str] = ()  # that it is one of, if it is no expression


@dataclass(frozen=True)
class Field:
    """A part of the message: from what opens it to what closes it."""

    name: str
    open: Marker | None
    close: Marker | None
    content: str  # of contents.CONTENTS
    content_args: Mapping[str, Any]
    join: str | None  # between its texts, if there are several
    transform: Any  # None: the content as it is
    transform_each: bool
    written: Mapping[str, str]  # how models write it, where that can't be told from its markers; ours alone


@dataclass(frozen=True)
class ResponseTemplate:
    """A template, checked."""

    name: str  # where it is from, for people
    start: regex.Pattern[str]
    fields: Sequence[Field]
    chat_template_has: Sequence[str] = ()

    @property
    def implicit(self) -> Field | None:
        """The field of all text that is no other's."""
        return next((field for field in self.fields if field.open is None), None)

    @property
    def calls(self) -> Field | None:
        return next((field for field in self.fields if field.name == "tool_calls"), None)

    @property
    def reasoning(self) -> Field | None:
        return next((field for field in self.fields if field.name in REASONING), None)

    def only(self, wanted: Callable[[Field], bool]) -> ResponseTemplate:
        """The template with these fields."""
        return replace(self, fields=[field for field in self.fields if wanted(field)])

    def begun(self, prompt: str) -> str:
        """The part of the assistant's message that is already in the prompt; empty if its beginning isn't found."""
        end = len(prompt)
        for found in self.start.finditer(prompt):
            end = found.end()
        return prompt[end:]


def load(spec: Any, name: str) -> ResponseTemplate:
    """The template that ``spec``, parsed JSON, declares.

    Raises:
        TemplateError: it isn't one.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("fields"), Mapping) or not spec["fields"]:
        raise TemplateError('a response template is an object that has "fields", an object that isn\'t empty')
    if spec.get("version", 1) != 1:
        raise TemplateError(f"its version is {spec['version']!r}; version 1 can be read")
    _check_keys("the template", spec, _KEYS)
    start = _marker("the template", spec, "start_anchor", "start_anchor_pattern")
    if start is None:
        raise TemplateError('it needs a "start_anchor": the text before the assistant\'s message')
    fields = [_field(each, declared) for each, declared in spec["fields"].items()]
    if sum(field.open is None for field in fields) > 1:
        raise TemplateError('more than one field has no "open"; all other text can be one field\'s only')
    return ResponseTemplate(name, start.pattern, fields, tuple(spec.get("chat_template_has", ())))


def _field(name: str, declared: Any) -> Field:
    where = f"the field {name!r}"
    if not isinstance(declared, Mapping):
        raise TemplateError(f"{where} must be an object")
    _check_keys(where, declared, _FIELD_KEYS)
    content = declared.get("content", "text")
    if content not in CONTENTS:
        raise TemplateError(f"{where} has content {content!r}; there are {', '.join(CONTENTS)}")
    join = declared.get("join")
    if join is not None and not isinstance(join, str):
        raise TemplateError(f"{where}: join must be a text")
    return Field(
        name=name,
        open=_marker(where, declared, "open", "open_pattern"),
        close=_marker(where, declared, "close", "close_pattern"),
        content=content,
        content_args=declared.get("content_args", {}),
        join=join,
        transform=declared.get("transform"),
        transform_each=bool(declared.get("transform_each", False)),
        written=declared.get("written", {}),
    )


def _marker(where: str, declared: Mapping[str, Any], text_key: str, pattern_key: str) -> Marker | None:
    if text_key in declared and pattern_key in declared:
        raise TemplateError(f"{where} may have {text_key} or {pattern_key}, not both")
    if text_key in declared:
        texts = declared[text_key]
        return text_marker([texts] if isinstance(texts, str) else texts, where)
    if pattern_key in declared:
        try:
            return Marker(regex.compile(declared[pattern_key], regex.DOTALL), declared[pattern_key], False)
        except (regex.error, TypeError) as error:
            raise TemplateError(f"{where}: {pattern_key} is no expression: {error}") from error
    return None


def text_marker(texts: Any, where: str = "a marker") -> Marker:
    """One of ``texts``, the longest that is there."""
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(each, str) and each for each in texts):
        raise TemplateError(f"{where} must be opened and closed by texts that aren't empty")
    source = "|".join(regex.escape(each) for each in sorted(texts, key=len, reverse=True))
    grows = any(one != other and one.startswith(other) for one in texts for other in texts)
    return Marker(regex.compile(source, regex.DOTALL), source, not grows, tuple(texts))


def _check_keys(where: str, declared: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(declared) - known):
        raise TemplateError(f"{where} has {', '.join(unknown)}; known are {', '.join(sorted(known))}")
