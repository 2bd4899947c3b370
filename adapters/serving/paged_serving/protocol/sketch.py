"""What bodies may hold, as JSON schemas: found by having the readers read, so that no second list can go stale.

Knows how Fields is asked; knows no field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from paged_serving.protocol.fields import ANYTHING, HUGE, Fields, ProtocolError

Schema = dict[str, Any]


def body_schema(read: Callable[[Any], object], *samples: Mapping[str, Any]) -> Schema:
    """The JSON schema of the bodies that ``read`` takes. It may be wider than that, and is never narrower.

    Args:
        read: makes something of a body, by ``fields_of``.
        samples: bodies with just the fields that must be there; several, if one of several fields must be.
    """
    sketches = [Sketch(sample) for sample in samples]
    for sketch in sketches:
        with suppress(ProtocolError):  # a model without a chat template refuses chats when all fields have been read
            read(sketch)
        assert sketch.finished, "the sample must get as far as the last field"
    required = [name for name in samples[0] if all(name in sample for sample in samples)]
    properties: Schema = {}
    for sketch in sketches:
        properties |= sketch.properties(required)
    if len(samples) > 1:
        return {**_object(properties, required), "anyOf": [{"required": list(sample)} for sample in samples]}
    return _object(properties, required)


class Sketch(Fields):
    """A body that stands for all: it holds a sample, and notes every field that it is asked for."""

    def __init__(self, sample: Mapping[str, Any], where: str = "") -> None:
        super().__init__(sample, where)
        self.finished = False
        self._required = list(sample)
        self._shapes: dict[str, Schema] = {}
        self._inner: dict[str, Sketch] = {}
        self._items: dict[str, Sketch] = {}

    def properties(self, required: Sequence[str]) -> Schema:
        """The fields by name. All but the ``required`` may be null, which counts as left out."""
        shapes = dict(self._shapes)
        shapes |= {name: inner.schema() for name, inner in self._inner.items()}
        shapes |= {name: {"type": "array", "minItems": 1, "items": item.schema()} for name, item in self._items.items()}
        return {name: shape if name in required else _or_null(shape) for name, shape in sorted(shapes.items())}

    def schema(self) -> Schema:
        return _object(self.properties(self._required), self._required)

    def any(self, name: str, shape: Mapping[str, Any] = ANYTHING) -> Any:
        self._shapes.setdefault(name, dict(shape))
        return super().any(name, shape)

    def flag(self, name: str, default: bool = False) -> bool:
        self._shapes[name] = {"type": "boolean", "default": default}
        return super().flag(name, default)

    def integer(self, name: str, default: Any = None, low: int = 0, high: int = 2**31 - 1) -> Any:
        self._shapes[name] = {"type": "integer", "minimum": low, "maximum": high, **_default(default)}
        return super().integer(name, default, low, high)

    def number(self, name: str, default: Any = None, low: float = -HUGE, high: float = HUGE) -> Any:
        bounds = {"minimum": low} if low > -HUGE else {}
        bounds |= {"maximum": high} if high < HUGE else {}
        self._shapes[name] = {"type": "number", **bounds, **_default(default)}
        return super().number(name, default, low, high)

    def text(self, name: str) -> str | None:
        self._shapes[name] = {"type": "string"}
        return super().text(name)

    def texts(self, name: str, least: int = 0) -> list[str]:
        text = {"type": "string", "minLength": 1}
        self._shapes[name] = {"anyOf": [text, {"type": "array", "items": text, "minItems": least}]}
        return super().texts(name, least)

    def integers(self, name: str) -> list[int] | None:
        self._shapes[name] = {"type": "array", "items": {"type": "integer"}}
        return super().integers(name)

    def inner(self, name: str) -> Fields:
        self._inner[name] = Sketch(self._values.pop(name, {}), self.path(name))
        return self._inner[name]

    def objects(self, name: str, most: int) -> list[Fields]:
        (sample,) = self._values.pop(name)
        self._items[name] = Sketch(sample, self.path(name))
        return [self._items[name]]

    def only(self, name: str, neutral: Sequence[Any], why: str) -> None:
        taken = [each for place, each in enumerate(neutral) if each not in neutral[:place]]
        self._shapes[name] = {"enum": taken, "description": f"{name} {why}"}
        super().only(name, neutral, why)

    def ignore(self, *names: str) -> None:
        self._shapes |= {name: {"description": "taken, and without effect"} for name in names}
        super().ignore(*names)

    def finish(self) -> None:
        super().finish()
        self.finished = True


def _object(properties: Schema, required: Sequence[str]) -> Schema:
    told = {"required": list(required)} if required else {}
    # A field that nobody knows is refused, unless it is null: that counts as left out.
    return {"type": "object", "additionalProperties": {"type": "null"}, "properties": properties, **told}


def _or_null(shape: Schema) -> Schema:
    if "enum" in shape:
        return {**shape, "enum": [*shape["enum"], None]}
    if "anyOf" in shape:
        return {**shape, "anyOf": [*shape["anyOf"], {"type": "null"}]}
    if "type" in shape:
        types = shape["type"] if isinstance(shape["type"], list) else [shape["type"]]
        return {**shape, "type": [*types, "null"]}
    return shape


def _default(value: Any) -> Schema:
    return {} if value is None else {"default": value}
