"""Unknown fields of requests: named in the answer's header, and once in the log. Knows no routes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.types import Scope

_log = logging.getLogger("paged_openai")
_MAX_NAMED = 16  # in one header
_MAX_TOLD = 256  # most names in the log, since clients may invent them
_KEY = "ignored_fields"


class IgnoredFields:
    """Those of one server's requests."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, scope: Scope, names: Sequence[str]) -> None:
        """The request of ``scope`` holds fields of these ``names``."""
        if not names:
            return
        scope[_KEY] = names
        new = [name for name in names if name not in self._told]
        if new and len(self._told) + len(new) <= _MAX_TOLD:
            self._told.update(new)
            told = "fields that this server doesn't know are left out (--strict-fields refuses them)"
            _log.warning(told, extra={"fields": {"path": scope["path"], "ignored_fields": new}})


def ignored_header(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The header ``x-ignored-fields``, if there are unknown fields. Names come from the client, so everything but
    printable ASCII is escaped."""
    names: Sequence[str] = scope.get(_KEY, ())
    told = [*names[:_MAX_NAMED], *(("...",) if len(names) > _MAX_NAMED else ())]
    return [(b"x-ignored-fields", ", ".join(map(_printable, told)).encode())] if told else []


def _printable(name: str) -> str:
    return "".join(each if "!" <= each <= "~" and each != "," else f"\\u{ord(each):04x}" for each in name)
