"""Reads JSON bodies field by field, and says which field is at fault. Knows JSON, and no protocol.

Why not a validation library: a request is a flat object of some forty fields, two protocols want their own words for
its mistakes, and TorchServe's environment (the other user of this room) should not need one more package.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import InvalidRequestError

ANYTHING: Mapping[str, Any] = {}
HUGE = 1e300  # JSON's integers have no bound, floats have
_MAX_DEPTH = 100  # objects and lists in each other: more than any schema needs, less than any reader's stack takes
_SHOWN = 60  # characters of a wrong value, or of its name, that an error repeats


class ProtocolError(InvalidRequestError):
    """A body that is refused. ``param`` is the field at fault; ``status`` the HTTP status, where one is decided."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status
        self.code = code


def parse_json(raw: bytes) -> Any:
    """The value of a body. Strict: no NaN, no halves of surrogate pairs, no field twice, no depth beyond reason.

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


class Fields:
    """A JSON object under reading. A field that is null counts as left out. ``finish`` refuses what nobody read."""

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, Mapping):
            raise ProtocolError(f"{where or 'the body'} must be a JSON object", where or None)
        self._values = {name: each for name, each in value.items() if each is not None}
        self._where = f"{where}." if where else ""

    def any(self, name: str, shape: Mapping[str, Any] = ANYTHING) -> Any:
        """A value that the reader checks itself; ``shape`` is what it takes, for the document of our routes."""
        return self._values.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"is {_shown(value)}; it must be true or false")
        return value

    def integer(self, name: str, default: Any = None, low: int = 0, high: int = 2**31 - 1) -> Any:
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"is {_shown(value)}; it must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: Any = None, low: float = -HUGE, high: float = HUGE) -> Any:
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(name, f"is {_shown(value)}; it must be a number{_between(low, high)}")
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.any(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"is {_shown(value)}; it must be a string")
        return value

    def texts(self, name: str, least: int = 0) -> list[str]:
        """Strings, ``least`` or more if there is the field; a lone one counts as a list of it."""
        value = self.any(name)
        if value is None:
            return []
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise self.error(name, "must be a string or a list of strings, none of them empty")
        if len(value) < least:
            raise self.error(name, "is an empty list; leave it out, or give a string")
        return value

    def integers(self, name: str) -> list[int] | None:
        value = self.any(name)
        if value is None:
            return None
        if not is_integers(value):
            raise self.error(name, "must be a list of integers")
        return list(value)

    def inner(self, name: str) -> Fields:
        """A field that is an object itself; empty if left out."""
        return Fields(self._values.pop(name, {}), self._where + name)

    def objects(self, name: str, most: int) -> list[Fields]:
        """A field that is a list of objects, at least one."""
        value = self.any(name)
        if not isinstance(value, list) or not value:
            raise self.error(name, "must be a list of at least one object")
        if len(value) > most:
            raise self.error(name, f"holds {len(value)} objects; at most {most} can be served")
        return [Fields(each, f"{self.path(name)}[{place}]") for place, each in enumerate(value)]

    def only(self, name: str, neutral: Sequence[Any], why: str) -> None:
        """Refuse every value of a field but those that ask for nothing."""
        value = self.any(name)
        if value is not None and not any(value == each and type(value) is type(each) for each in neutral):
            raise self.error(name, why)

    def ignore(self, *names: str) -> None:
        """Labels and hints that change no answer."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        """Raises ProtocolError for a field that nobody has read: a wish is never left out silently."""
        for name in self._values:
            raise self.error(shortened(name), "is not a field that this server knows")

    def error(self, name: str, why: str) -> ProtocolError:
        return ProtocolError(f"{self.path(name)} {why}", self.path(name))

    def path(self, name: str) -> str:
        """The name of a field as the whole body knows it."""
        return self._where + name


def fields_of(body: Any) -> Fields:
    """The fields of a body. One that is Fields already stands for itself (a Sketch)."""
    return body if isinstance(body, Fields) else Fields(body)


def is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def shortened(text: str, most: int = _SHOWN) -> str:
    """The beginning of what a client sent, for an error that quotes it."""
    return text if len(text) <= most else text[:most] + "..."


def _shown(value: Any) -> str:
    return shortened(json.dumps(value))


def _between(low: float, high: float) -> str:
    if high == HUGE:
        return "" if low == -HUGE else f" of at least {low:g}"
    return f" from {low:g} to {high:g}"


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a field that stands there twice, one wish would be left out silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{_shown(name)} stands twice in one object")  # escaped: it may hold half a pair
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
