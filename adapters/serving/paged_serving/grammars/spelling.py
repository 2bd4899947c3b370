"""Requests for structured output, written as llguidance's grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import InvalidRequestError
from paged_serving.grammars.form import JsonForm
from paged_serving.grammars.schemas import adapted

_MAX_TEXT = 262_144  # characters of a grammar: a second's work
_SPACE = r"[\n\r]{0,2}[ \t]{0,32}"  # a line break and its indentation; without a limit, some models never stop
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def spell(kind: str, value: Any, form: JsonForm) -> str:
    """``kind`` is "json" (a schema, or its text), "regex", "choice" (strings) or "grammar" (Lark or GBNF).

    Raises:
        InvalidRequestError: it can't be read, is too long, or llguidance would enforce it wrongly.
    """
    if kind == "json":
        return _json(value, form)
    if kind == "choice":
        return _lark(_choice(value))
    text = _checked(str(value))
    if kind == "regex":
        from llguidance import LLMatcher

        spelt: str = LLMatcher.grammar_from_regex(_ascii(text))
        return spelt
    return _lark(_from_gbnf(text) if _GBNF_RULE.search(text) else text)


def json_rule(schema: Any, form: JsonForm) -> str:
    """A JSON schema as the right side of a Lark rule. Raises as ``spell``."""
    found, options = _checked_schema(schema, form)
    return f"%json {json.dumps({'x-guidance': options, **({} if found is True else found)}, ensure_ascii=False)}"


def choice_rule(choices: Sequence[str]) -> str:
    """The same for a choice."""
    return " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)


def _json(schema: Any, form: JsonForm) -> str:
    from llguidance import LLMatcher

    found, options = _checked_schema(schema, form)
    try:
        text = _checked(json.dumps(found, ensure_ascii=False))
        spelt: str = LLMatcher.grammar_from_json_schema(text, overrides=options)
    except ValueError as error:
        raise InvalidRequestError(f"the schema can't be read: {error}") from error
    return spelt


def _checked_schema(schema: Any, form: JsonForm) -> tuple[Any, Any]:
    """(a schema that llguidance reads rightly, how it is to be set)."""
    if isinstance(schema, str):
        schema = _parsed(_checked(schema))
    if not isinstance(schema, (Mapping, bool)):
        raise InvalidRequestError(f"a JSON schema must be an object; it is {type(schema).__name__}")
    _checked(json.dumps(schema, ensure_ascii=False))
    space = _SPACE if form.whitespace_pattern is None else form.whitespace_pattern
    options: Any = {"whitespace_flexible": False} if form.disable_any_whitespace else {"whitespace_pattern": space}
    return adapted(schema), options


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the schema can't be read: {error}") from error


def _choice(choices: Sequence[str]) -> str:
    """Written here, because llguidance escapes non-ASCII characters but can't read such escapes. One terminal, because
    llguidance does not accept thousands of rules."""
    return f"start: ANY\nANY: {choice_rule(choices)}"


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark: str = gbnf_to_lark(text)
    except Exception as error:  # any error of a grammar's parser
        raise InvalidRequestError(f"the GBNF grammar can't be read: {error}") from error
    return lark


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    spelt: str = LLMatcher.grammar_from_lark(_checked(text))
    return spelt


def _ascii(expression: str) -> str:
    r"""``\d``, ``\w`` and ``\s`` for ASCII only, as in patterns of JSON schemas. In llguidance they match digits,
    letters and spaces of all scripts. A class inside a class is a part of it."""

    def spelt(escape: re.Match[str]) -> str:
        inside = _CLASSES.get(escape[1].lower())
        if inside is None:
            return escape[0]
        return f"[{'^' if escape[1].isupper() else ''}{inside}]"

    return _ESCAPE.sub(spelt, expression)


def _checked(text: str) -> str:
    if len(text) > _MAX_TEXT:
        raise InvalidRequestError(f"the grammar has {len(text)} characters; at most {_MAX_TEXT} are taken")
    return text
