"""The faults of a body: which field, its value, and what it must be. Knows no protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from paged_serving.protocol.bodies import HUGE, Body, BodyField, body_of, fields_of, fitting_kind
from paged_serving.protocol.parsing import ProtocolError, shortened, shown

Fault = tuple[str | None, str]  # the field as the whole body knows it, None for the body itself; what is wrong with it
_MANY = {inspect.IntType: "integers", inspect.StrType: "strings", inspect.StructType: "objects"}


def refusal(fault: Fault) -> ProtocolError:
    path, why = fault
    return ProtocolError(f"{'the body' if path is None else path} {why}", path)


def faults(value: Any, body: type[Body], path: str | None = None) -> Iterator[Fault]:
    """The faults of ``value``, which can't be converted to ``body``: invalid fields, then unknown ones."""
    if not isinstance(value, Mapping):
        yield path, "must be a JSON object"
        return
    fields = fields_of(body)
    for name, field in fields.items():
        if name in value:
            yield from _faults_of_field(value[name], field, _joined(path, name))
        elif field.required:
            yield _joined(path, name), f"is missing; it must be {_wanted(field)}"
    for name in value:
        if name not in fields:
            yield _joined(path, shortened(name)), body.elsewhere.get(name, "is not a field that this server knows")


def unheeded(body: Body, path: str | None = None) -> Iterator[Fault]:
    """Faults of ``body`` that types don't exclude: fields that can't be honoured, integers beyond 63 bits."""
    for name, field in _watched(type(body)):
        value, where = getattr(body, name), _joined(path, name)
        if field.body is not None and value is not None:
            yield from unheeded(value, where)
        elif field.item is not None:
            for place, item in enumerate(value or ()):
                yield from unheeded(item, f"{where}[{place}]")
        elif value is not None and not _is_heeded(value, field):
            yield where, field.extra.get("why") or _told(value, field)


@cache
def _watched(body: type[Body]) -> list[tuple[str, BodyField]]:
    return [
        (name, field)
        for name, field in fields_of(body).items()
        if field.body or field.item or field.extra.keys() & {"neutral", "range"}
    ]


def _is_heeded(value: Any, field: BodyField) -> bool:
    if "range" in field.extra:
        low, high = field.extra["range"]
        return bool(low <= value <= high)
    return any(value == each and type(value) is type(each) for each in field.extra["neutral"])


def _faults_of_field(value: Any, field: BodyField, path: str) -> Iterator[Fault]:
    try:
        msgspec.convert(value, field.annotation)
    except msgspec.ValidationError:
        fitting = fitting_kind(value, field.kind)
        if (body := body_of(fitting)) is not None:
            yield from faults(value, body, path)
        elif isinstance(fitting, inspect.ListType) and value and (item := body_of(fitting.item_type)) is not None:
            for place, each in enumerate(value):
                yield from faults(each, item, f"{path}[{place}]")
        elif (wrong := _wrong_item(value, field)) is not None:
            place, wanted = wrong
            yield f"{path}[{place}]", f"is {shown(value[place])}; it must be {wanted}"
        else:
            yield path, _told(value, field)


def _wrong_item(value: Any, field: BodyField) -> tuple[int, str] | None:
    """For a list of plain values: (index of the first invalid one, what it must be). None: not such a list."""
    kinds = field.kind.types if isinstance(field.kind, inspect.UnionType) else (field.kind,)
    item = next((kind.item_type for kind in kinds if isinstance(kind, inspect.ListType)), None)
    if item is None or not isinstance(value, list):
        return None
    for place, each in enumerate(value):
        try:
            msgspec.convert([each], field.annotation)
        except msgspec.ValidationError:
            return place, _described(item)
    return None


def _joined(path: str | None, name: str) -> str:
    return name if path is None else f"{path}.{name}"


def _told(value: Any, field: BodyField) -> str:
    return f"is {shown(value)}; it must be {_wanted(field)}"


def _wanted(field: BodyField) -> str:
    return str(field.extra.get("must") or _described(field.kind))


def _described(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return str((kind.extra or {}).get("must") or _described(kind.type))
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.IntType):
        return "an integer" if kind.ge is None else f"an integer from {kind.ge} to {kind.le}"
    if isinstance(kind, inspect.FloatType):
        return "a number" + _between(kind.ge, kind.le)
    if isinstance(kind, inspect.StrType):
        return "a string that isn't empty" if kind.min_length else "a string"
    if isinstance(kind, inspect.LiteralType):
        return _joined_by_or([json.dumps(each) for each in kind.values])
    if isinstance(kind, inspect.ListType):
        return f"a list of {_MANY.get(type(kind.item_type), 'values')}"
    if isinstance(kind, inspect.UnionType):
        return _joined_by_or([_described(each) for each in kind.types if not isinstance(each, inspect.NoneType)])
    return "a JSON object"


def _joined_by_or(parts: Sequence[str]) -> str:
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _between(low: float | None, high: float | None) -> str:
    if high is None or high == HUGE:
        return "" if low is None or low == -HUGE else f" of at least {low:g}"
    return f" from {low:g} to {high:g}"
