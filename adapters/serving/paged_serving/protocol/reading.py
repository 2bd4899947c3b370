"""Reads bodies: the one place where a JSON object becomes an object of its class. Knows no protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from paged_serving.protocol.bodies import Body, Defaults, DefaultsSource, body_of, fields_of, fitting_kind
from paged_serving.protocol.faults import faults, refusal, unheeded
from paged_serving.protocol.parsing import shortened

_Body = TypeVar("_Body", bound=Body)


def read_body(body: type[_Body], value: Any, served: DefaultsSource) -> _Body:
    """``value``, parsed JSON, as a ``body``. A field that is null counts as left out, and so does one that isn't
    declared, unless ``served.strict_fields``; ``unknown_fields`` tells which these are.

    Raises:
        ProtocolError: it isn't one, holds a field that isn't declared, or asks for what can't be honoured.
    """
    if isinstance(value, Mapping):
        value = _filled(value, body, body.defaults(served, value), served.strict_fields)
    try:
        found = msgspec.convert(value, body)
    except msgspec.ValidationError:
        raise refusal(next(faults(value, body))) from None
    for fault in unheeded(found):
        raise refusal(fault)
    return found


def unknown_fields(value: Any, body: type[Body]) -> list[str]:
    """The fields of ``value``, parsed JSON, that ``body`` doesn't declare, each once. One in an object of a list is
    told without its place: ``messages[].id``."""
    return list(dict.fromkeys(_unknown(value, body, ""))) if isinstance(value, Mapping) else []


def _filled(value: Mapping[str, Any], body: type[Body], defaults: Defaults, strict: bool) -> dict[str, Any]:
    """Without nulls, with defaults, and with 3.0 as 3 where an integer is declared: JSON has one kind of number. Not
    ``strict``: without fields that nobody knows; those that are known elsewhere stay, to be refused."""
    fields, (objects, adapted) = fields_of(body), _adapted(body)
    known = fields.keys() | body.elsewhere.keys()
    found = dict(defaults.get(body, ()))
    for name, inner in objects:
        found[name] = _filled({}, inner, defaults, strict)
    for name, each in value.items():
        if each is not None and (strict or name in known):
            found[name] = _plain(each, adapted[name], defaults, strict) if name in adapted else each
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


def _plain(value: Any, kind: inspect.Type, defaults: Defaults, strict: bool) -> Any:
    if isinstance(value, float):
        return int(value) if isinstance(kind, inspect.IntType) and value.is_integer() else value
    fitting = fitting_kind(value, kind)
    if isinstance(value, Mapping) and (body := body_of(fitting)) is not None:
        return _filled(value, body, defaults, strict)
    if isinstance(value, list) and isinstance(fitting, inspect.ListType):
        return [_plain(item, fitting.item_type, defaults, strict) for item in value]
    return value


def _unknown(value: Mapping[str, Any], body: type[Body], path: str) -> Iterator[str]:
    fields, (_, adapted) = fields_of(body), _adapted(body)
    for name, each in value.items():
        if each is not None and name not in fields and name not in body.elsewhere:
            yield path + shortened(name)
        elif name in adapted:
            yield from _unknown_inside(each, adapted[name], path + name)


def _unknown_inside(value: Any, kind: inspect.Type, path: str) -> Iterator[str]:
    fitting = fitting_kind(value, kind)
    if isinstance(value, Mapping) and (body := body_of(fitting)) is not None:
        yield from _unknown(value, body, f"{path}.")
    elif isinstance(value, list) and isinstance(fitting, inspect.ListType):
        for item in value:
            yield from _unknown_inside(item, fitting.item_type, f"{path}[]")
