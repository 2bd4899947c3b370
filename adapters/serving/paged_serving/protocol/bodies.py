"""How bodies are declared: a class has the fields, their types and limits, and their defaults. ``reading`` makes an
object of the class from a body, ``faults`` finds what is wrong with one, ``document`` makes JSON schemas. Knows no
protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import msgspec
from msgspec import Meta, inspect

HUGE = 1e300  # JSON's integers have no bound, floats have
MAX_INTEGER = 2**31 - 1

Defaults = Mapping[type, Mapping[str, Any]]  # class of a body -> its fields' values where they are left out


class DefaultsSource(Protocol):
    """What ``defaults`` may depend on: a ServedModel."""

    @property
    def defaults(self) -> Mapping[str, float]: ...

    @property
    def strict_fields(self) -> bool: ...  # whether a field that nobody knows is refused, or left out

    def default_max_tokens(self, usual: int | None) -> int | None: ...


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object. The class has the fields' defaults; ``defaults`` has those that depend on the model."""

    elsewhere: ClassVar[Mapping[str, str]] = {}  # fields that other bodies have -> why this one can't be given them

    @classmethod
    def defaults(cls, served: DefaultsSource, wished: Mapping[str, Any]) -> Defaults:
        """The defaults of fields that ``wished``, the original body, leaves out."""
        return {}


# ---- what fields may hold ----------------------------------------------------------------------------------------


def between(low: float, high: float = MAX_INTEGER) -> Meta:
    """Bounds of a number, both included."""
    return Meta(ge=low, le=high)


def wide(low: int, high: int) -> Meta:
    """The same for an integer of more than 63 bits."""
    told = {"minimum": low, "maximum": high}
    return Meta(extra={"must": f"an integer from {low} to {high}", "range": (low, high)}, extra_json_schema=told)


def must(be: str) -> Meta:
    """What a value must be, for errors, instead of a description of the type."""
    return Meta(extra={"must": be})


def only(*neutral: Any, why: str) -> Meta:
    """A field that can't be honoured: every value is refused, except those that ask for nothing."""
    apart = [each for place, each in enumerate(neutral) if each not in neutral[:place]]  # JSON's 1.0 is 1
    told = {"enum": apart, "description": f"it {why}"}
    return Meta(extra={"neutral": neutral, "why": why}, extra_json_schema=told)


Ignored = Annotated[Any, Meta(description="taken, and without effect")]  # labels and hints that change no answer
Whole = Annotated[int, between(0)]
Positive = Annotated[int, between(1)]
Number = Annotated[float, between(-HUGE, HUGE)]
Share = Annotated[float, between(0, 1)]
Penalty = Annotated[float, between(-2, 2)]
Text = Annotated[str, Meta(min_length=1)]
Texts = Annotated[Text | list[Text], must("a string or a list of strings, none of them empty")]
ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$"), must("1 to 128 letters, digits, '_', '-' and '.'")]
TokenIds = Annotated[list[int], must("a list of integers")]


def listed(texts: str | list[str]) -> list[str]:
    """``Texts`` as a list: a lone one counts as a list of it."""
    return [texts] if isinstance(texts, str) else texts


# ---- what a class declares ---------------------------------------------------------------------------------------


class BodyField(NamedTuple):
    """One field of a Body."""

    annotation: Any  # as msgspec converts to it
    kind: inspect.Type  # without its Metas, and without None where it may be left out
    extra: Mapping[str, Any]  # of its Metas
    required: bool
    body: type[Body] | None  # the class of an object
    item: type[Body] | None  # the class of a list's objects
    filled: bool  # an object that is there, and made of defaults, where it is left out


@cache
def fields_of(body: type[Body]) -> Mapping[str, BodyField]:
    """By name, in the order in which they are declared."""
    return {each.name: _field(each) for each in msgspec.structs.fields(body)}


def body_of(kind: inspect.Type) -> type[Body] | None:
    return kind.cls if isinstance(kind, inspect.StructType) and issubclass(kind.cls, Body) else None


def fitting_kind(value: Any, kind: inspect.Type) -> inspect.Type:
    """Of a field's kinds, the one as which an object or a list is read."""
    for each in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
        if isinstance(value, Mapping) and body_of(each) is not None:
            return each
        if isinstance(value, list) and isinstance(each, inspect.ListType) and body_of(each.item_type) is not None:
            return each
    return inspect.AnyType()


def _field(info: msgspec.structs.FieldInfo) -> BodyField:
    kind, extra = _bare(inspect.type_info(info.type))
    body = body_of(kind)
    item = body_of(kind.item_type) if isinstance(kind, inspect.ListType) else None
    filled = body is not None and not info.required and info.default is not None
    return BodyField(info.type, kind, extra, info.required, body, item, filled)


def _bare(kind: inspect.Type) -> tuple[inspect.Type, dict[str, Any]]:
    extra: dict[str, Any] = {}
    while isinstance(kind, inspect.Metadata):
        extra |= kind.extra or {}
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        rest = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
        if len(rest) == 1:
            kind, inner = _bare(rest[0])
            extra = inner | extra
    return kind, extra
