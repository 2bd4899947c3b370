"""Bodies read: the one place where a JSON object becomes what its class declares. Knows no protocol."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from paged_serving.protocol.bodies import Body, Defaults, Served, body_of, fields_of
from paged_serving.protocol.faults import faults, refusal, unheeded

_Body = TypeVar("_Body", bound=Body)


def read_body(body: type[_Body], value: Any, served: Served) -> _Body:
    """``value``, parsed JSON, as a ``body``. A field that is null counts as left out.

    Raises:
        ProtocolError: it isn't one, holds a field that isn't declared, or asks for what can't be honoured.
    """
    if isinstance(value, Mapping):
        value = _filled(value, body, body.defaults(served, value))
    try:
        found = msgspec.convert(value, body)
    except msgspec.ValidationError:
        raise refusal(next(faults(value, body))) from None
    for fault in unheeded(found):
        raise refusal(fault)
    return found


def _filled(value: Mapping[str, Any], body: type[Body], defaults: Defaults) -> dict[str, Any]:
    """Without nulls, with defaults, and with 3.0 as 3 where an integer is declared: JSON has one kind of number."""
    objects, adapted = _adapted(body)
    found = dict(defaults.get(body, ()))
    for name, inner in objects:
        found[name] = _filled({}, inner, defaults)
    for name, each in value.items():
        if each is not None:
            found[name] = _plain(each, adapted[name], defaults) if name in adapted else each
    return found


@cache
def _adapted(body: type[Body]) -> tuple[list[tuple[str, type[Body]]], Mapping[str, inspect.Type]]:
    """(objects that are there where they are left out; fields whose values may not be converted as they come)."""
    fields = fields_of(body)
    objects = [(name, field.body) for name, field in fields.items() if field.filled and field.body]
    return objects, {name: field.kind for name, field in fields.items() if _adapts(field.kind)}


def _adapts(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.UnionType):
        return any(isinstance(each, inspect.ListType | inspect.StructType) and _adapts(each) for each in kind.types)
    if isinstance(kind, inspect.ListType):
        return body_of(kind.item_type) is not None
    return isinstance(kind, inspect.IntType) or body_of(kind) is not None


def _plain(value: Any, kind: inspect.Type, defaults: Defaults) -> Any:
    if isinstance(value, float):
        return int(value) if isinstance(kind, inspect.IntType) and value.is_integer() else value
    if isinstance(value, Mapping | list):
        for each in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
            if isinstance(value, Mapping) and (body := body_of(each)) is not None:
                return _filled(value, body, defaults)
            if isinstance(value, list) and isinstance(each, inspect.ListType) and _adapts(each):
                return [_plain(item, each.item_type, defaults) for item in value]
    return value
