"""JSON schemas in a form that llguidance enforces exactly, or a refusal. llguidance keeps numbers as doubles, refuses
unknown formats, which JSON Schema treats as annotations, and waits for keys of ``patternProperties`` that have all been
used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import product
from typing import Any

from paged_core import InvalidRequestError

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown")
)
_ANNOTATIONS = frozenset(("default", "examples", "example", "title", "description", "$comment"))
_VALUES = frozenset(("const", "enum"))
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))  # name -> schema
_LARGEST = 2**53  # up to here doubles are exact
_MAX_DIGITS = 15  # that every double keeps
_MAX_KEYS = 64


def adapted(schema: Any) -> Any:
    """``schema`` as llguidance reads it rightly.

    Raises:
        InvalidRequestError: a number in it would not be followed exactly, or it is too deep.
    """
    try:
        return _adapted(schema)
    except RecursionError:
        raise InvalidRequestError("the schema is nested too deeply") from None


def _adapted(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_adapted(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {name: _keyword(name, value) for name, value in schema.items() if not _is_annotation(name, value)}
    return _with_keys_spelt_out(found) if isinstance(found.get("patternProperties"), dict) else found


def _keyword(name: str, value: Any) -> Any:
    if name in _VALUES or name in _BOUNDS:
        for number in _numbers(value):
            _check_exact(name, number)
        return value
    if name in _NAMED and isinstance(value, Mapping):
        return {key: _adapted(inner) for key, inner in value.items()}
    return value if name in _ANNOTATIONS else _adapted(value)


def _is_annotation(name: str, value: Any) -> bool:
    return name == "format" and isinstance(value, str) and value not in FORMATS


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _check_exact(name: str, number: int | float) -> None:
    if not math.isfinite(number) or abs(number) > _LARGEST:
        told = f"{name} holds {str(number)[:40]}, and numbers are exact from {-_LARGEST} to {_LARGEST} only"
        raise InvalidRequestError(f"{told}; ask for it as a string")
    if number != int(number) and len(Decimal(repr(number)).as_tuple().digits) > _MAX_DIGITS:
        told = f"{name} holds {number!r}, and numbers are exact up to {_MAX_DIGITS} digits only"
        raise InvalidRequestError(f"{told}; round it, or ask for it as a string")


# ---- keys that a pattern names -----------------------------------------------------------------------------------


def _with_keys_spelt_out(schema: dict[str, Any]) -> dict[str, Any]:
    """Replace patterns that match only a few keys by these keys, among the ``properties``."""
    properties, patterns = dict(schema.get("properties") or {}), {}
    for pattern, inner in schema["patternProperties"].items():
        keys = _keys(pattern)
        if keys is None:
            patterns[pattern] = inner
        for key in keys or ():
            properties[key] = {"allOf": [properties[key], inner]} if key in properties else inner
    spelt = {**schema, "properties": properties, "patternProperties": patterns}
    if not patterns:
        del spelt["patternProperties"]
    return spelt


_PART = re.compile(r"\((?:\?:)?([^()\[\]{}*+?.\\^$]*)\)|\[([^\[\]\\^-]+)\]|([^()\[\]{}*+?.\\^$|])")


def _keys(pattern: str) -> list[str] | None:
    """All keys that match; None if they are many or unknown."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    inside, place, parts = pattern[1:-1], 0, []
    while place < len(inside):
        part = _PART.match(inside, place)
        if part is None:
            return None
        alternatives, characters, character = part.groups()
        parts.append(alternatives.split("|") if alternatives is not None else list(characters or character))
        place = part.end()
        if math.prod(map(len, parts)) > _MAX_KEYS:
            return None
    return list(dict.fromkeys("".join(each) for each in product(*parts)))
