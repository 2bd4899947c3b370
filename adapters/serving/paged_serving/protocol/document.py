"""Bodies as JSON schemas, made from the classes that read them. Knows no protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from paged_serving.protocol.bodies import Body, Defaults, DefaultsSource

Schema = dict[str, Any]
_NAMED = "#/{name}"
_NULL = {"type": "null"}


def body_schema(body: type[Body], served: DefaultsSource, *, one_of: Sequence[str] = ()) -> Schema:
    """The JSON schema of what ``read_body`` takes. It may allow more than that, never less.

    ``one_of``: fields of which one must be there.
    """
    (root,), classes = msgspec.json.schema_components([body], ref_template=_NAMED)
    told: Schema = _resolved(root, classes, _by_name(body.defaults(served, {})), served.strict_fields)
    return {**told, "anyOf": [{"required": [name]} for name in one_of]} if one_of else told


def _by_name(defaults: Defaults) -> Mapping[str, Mapping[str, Any]]:
    return {kind.__name__: values for kind, values in defaults.items()}


def _resolved(schema: Any, classes: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]], strict: bool) -> Any:
    """``schema`` with references replaced by their classes, and with null allowed for absent fields."""
    if isinstance(schema, list):
        return [_resolved(each, classes, defaults, strict) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/")
        inside = _resolved(classes[name], classes, defaults, strict)
        return {**_object(inside, defaults.get(name, {}), strict), **_beside(schema)}
    return {name: _resolved(each, classes, defaults, strict) for name, each in schema.items()}


def _beside(schema: Schema) -> Schema:
    return {name: each for name, each in schema.items() if name != "$ref"}


def _object(schema: Schema, defaults: Mapping[str, Any], strict: bool) -> Schema:
    """A body of our own. If it is ``strict``, a field that nobody knows is refused, unless it is null."""
    required = schema.get("required", [])
    properties = {
        name: shape if name in required else _or_null({**shape, **_default(name, defaults)})
        for name, shape in schema["properties"].items()
    }
    told = {**schema, "properties": properties, "additionalProperties": _NULL if strict else True}
    return told if required else {name: each for name, each in told.items() if name != "required"}


def _default(name: str, defaults: Mapping[str, Any]) -> Schema:
    return {"default": defaults[name]} if name in defaults else {}


def _or_null(shape: Schema) -> Schema:
    shape = {name: each for name, each in shape.items() if name != "default" or each not in (None, {})}
    if "enum" in shape:
        return {**shape, "enum": [*shape["enum"], None]}
    if "anyOf" in shape:
        kinds = [each for each in shape["anyOf"] if each != _NULL]
        alone = {name: each for name, each in shape.items() if name != "anyOf"}
        return _or_null({**kinds[0], **alone}) if len(kinds) == 1 else {**shape, "anyOf": [*kinds, _NULL]}
    return {**shape, "type": [shape["type"], "null"]} if "type" in shape else shape
