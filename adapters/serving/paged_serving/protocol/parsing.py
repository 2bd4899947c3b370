"""Bytes to JSON values, strictly, and the error for refused ones. Knows no field. It uses the standard library's
parser, because msgspec's silently drops the first of two fields with the same name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from paged_core import InvalidRequestError, SamplingParams

_MAX_DEPTH = 100  # objects and lists in each other: more than any schema needs, less than any reader's stack takes
_OF_CORE = frozenset(each.name for each in fields(SamplingParams))
_SHOWN = 60  # characters of a wrong value, or of its name, that an error repeats


class ProtocolError(InvalidRequestError):
    """A body that is refused. ``param`` is the field at fault; ``status`` the HTTP status, where one is decided."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status
        self.code = code


def refuse(name: str, why: str) -> NoReturn:
    """Raises the ProtocolError of field ``name``."""
    raise ProtocolError(f"{name} {why}", name)


def in_words_of(named: Mapping[str, str], error: InvalidRequestError) -> ProtocolError:
    """An ``error`` of the core, with the protocol's name of the field. ``named``: the protocol's names of fields, where
    they differ."""
    if isinstance(error, ProtocolError):
        return error
    told, param = str(error), error.param
    if param is None and told.split()[0] in _OF_CORE:
        param = told.split()[0]
    for field, own in named.items():
        if field in _OF_CORE:
            told = re.sub(_word(field), own, told)
    if param is not None:
        param = named.get(param, param)
        told = told if re.search(_word(param), told) else f"{param}: {told}"
    return ProtocolError(told, param)


def _word(field: str) -> str:
    return rf"(?<![\w.]){re.escape(field)}(?![\w.])"


def refuse_unless_object(name: str, text: str) -> None:
    """Field ``name`` holds the JSON text of an object; an empty one counts as such.

    Raises:
        ProtocolError: it doesn't.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        refuse(name, "must be the JSON text of an object")


def parse_json(raw: bytes) -> Any:
    """The value of a body. Strict: no NaN, no lone surrogates, no duplicate fields, no excessive depth.

    Raises:
        ProtocolError: it isn't JSON.
    """
    try:
        text = raw.decode()
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
        if text.count("[") + text.count("{") > _MAX_DEPTH:
            _check_depth(value)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body isn't JSON that can be read: {error}") from None
    return value


def shortened(text: str, most: int = _SHOWN) -> str:
    """The beginning of what a client sent, for an error that quotes it."""
    return text if len(text) <= most else text[:most] + "..."


def shown(value: Any) -> str:
    """The beginning of a JSON value, for an error that quotes it."""
    return shortened(json.dumps(value))


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Duplicate fields are refused, because one would be dropped silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(name)} stands twice in one object")  # escaped: it may hold half a pair
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for values in inside for each in values if isinstance(each, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
