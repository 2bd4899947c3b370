"""Converts untyped arguments to the types of their parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from paged_serving.response_templates.contents import number

_PYTHONS = {"True": "true", "False": "false", "None": "null"}
_MOST_STEPS = 16  # from one schema to those that it names


def cast(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Convert strings to the types in their parameters' schemas, where possible."""
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        return dict(arguments)
    return {
        name: _cast(value, types_of(properties.get(name), parameters)) if isinstance(value, str) else value
        for name, value in arguments.items()
    }


def types_of(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """JSON's types that a schema declares; none, where it declares none."""
    return list(_types(schema, root, _MOST_STEPS))


def _types(schema: Any, root: Mapping[str, Any], steps: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or not steps:
        return
    named = schema.get("type")
    yield from [named] if isinstance(named, str) else named if isinstance(named, list) else ()
    for union in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(union) or ():
            yield from _types(each, root, steps - 1)
    if schema.get("nullable"):
        yield "null"
    if isinstance(schema.get("$ref"), str):
        yield from _types(_referred(schema["$ref"], root), root, steps - 1)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root if reference.startswith("#/") else None
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _cast(text: str, types: list[str]) -> Any:
    """A string stays one where it may be one."""
    if not types or "string" in types:
        return None if text == "null" and "null" in types else text
    try:
        value = json.loads(_PYTHONS.get(text.strip(), text), parse_float=number)
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
