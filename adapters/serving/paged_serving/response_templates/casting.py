"""Arguments that are written without types, given those that their parameters have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def cast(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Strings become what the schema of their parameter wants, where they can be read so; the rest stays."""
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        return dict(arguments)
    return {
        name: _cast(value, list(_types(properties.get(name)))) if isinstance(value, str) else value
        for name, value in arguments.items()
    }


def _types(schema: Any) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    named = schema.get("type")
    yield from [named] if isinstance(named, str) else named if isinstance(named, list) else ()
    for union in ("anyOf", "oneOf"):
        for each in schema.get(union) or ():
            yield from _types(each)
    if schema.get("nullable"):
        yield "null"


def _cast(text: str, types: list[str]) -> Any:
    """A string stays one where it may be one."""
    if not types or "string" in types:
        return None if text == "null" and "null" in types else text
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    except (ValueError, RecursionError):
        return text
    return _as(value, types) if _is_any(value, types) else text


def _is_any(value: Any, types: list[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, float):
        return "number" in types or ("integer" in types and value.is_integer())
    kinds = {int: ("integer", "number"), dict: ("object",), list: ("array",), type(None): ("null",)}
    return any(kind in types for kind in kinds.get(type(value), ()))


def _as(value: Any, types: list[str]) -> Any:
    return int(value) if isinstance(value, float) and "number" not in types else value
