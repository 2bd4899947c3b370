"""Splits text that comes in pieces at a template's markers. Knows no events. Text that may be the beginning of a marker
is held back until it is certain, so the joined segments don't depend on the pieces. No marker is longer than
``LONGEST``, so the cost of a piece does not depend on the length of the earlier text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import regex

from paged_serving.response_templates.template import Field, Marker, ResponseTemplate, text_marker

LONGEST = 1024  # characters of a marker, the white space that it may begin with included


@dataclass(frozen=True)
class Segment:
    """A field opens, has text, or closes. None: text outside of fields."""

    kind: Literal["open", "text", "close"]
    of: Field | None
    text: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)  # that the marker names


class _Watched(NamedTuple):
    kind: Literal["open", "close", "silent"]
    field: Field | None
    marker: Marker


class _Found(NamedTuple):
    watched: _Watched
    match: regex.Match[str]

    @property
    def order(self) -> tuple[int, int, str]:
        """The first counts; of several that begin together the longest, and what opens before what closes."""
        kinds = {"open": "0", "close": "1", "silent": "2"}
        return self.match.start(), -len(self.match[0]), kinds[self.watched.kind]


class Scanner:
    """
    Args:
        silent: texts that are left out, where they are no part of a marker: special tokens.
    """

    def __init__(self, template: ResponseTemplate, silent: Sequence[str] = ()) -> None:
        self._silent = [_Watched("silent", None, text_marker(silent))] if silent else []
        self._implicit = template.implicit
        self._outside = self._watched_outside(template.fields)
        self._field = self._implicit  # that text is of now
        self._text = ""
        self._place = 0  # in the text: what comes before is done
        self._opened_at: int | None = None  # by a marker without text: it opens once there

    def _watched_outside(self, fields: Sequence[Field]) -> list[_Watched]:
        opening = [_Watched("open", field, field.open) for field in fields if field.open is not None]
        implicit = self._implicit
        closing = [_Watched("close", implicit, implicit.close)] if implicit is not None and implicit.close else []
        return [*opening, *closing, *self._silent]

    @property
    def field(self) -> Field | None:
        """That text is of now."""
        return self._field

    def feed(self, text: str) -> Iterator[Segment]:
        for start in range(0, len(text), LONGEST):
            self._forget()
            self._text += text[start : start + LONGEST]
            yield from self._segments(ended=False)

    def finish(self, *, cut: bool) -> Iterator[Segment]:
        """What was held back; no field closes by that. ``cut``: what may have become a marker is left out."""
        return self._segments(ended=True, cut=cut)

    def _forget(self) -> None:
        """What is done, but for what a marker may look back at."""
        gone = self._place - LONGEST
        if gone >= LONGEST:
            self._text, self._place = self._text[gone:], LONGEST
            self._opened_at = None if self._opened_at is None else self._opened_at - gone

    def _segments(self, *, ended: bool, cut: bool = False) -> Iterator[Segment]:
        while True:
            found, certain = self._next(ended)
            if found is None and cut:
                certain = self._next(ended=False)[1]
            stop = certain if found is None else found.match.start()
            if stop > self._place:
                yield Segment("text", self._field, self._text[self._place : stop])
                self._place = stop
            if found is None:
                return
            self._place = found.match.end()
            yield from self._pass(found)

    def _pass(self, found: _Found) -> Iterator[Segment]:
        """A marker is passed."""
        kind, field, _ = found.watched
        groups = {name: each for name, each in found.match.groupdict().items() if each is not None}
        if kind == "open":
            if self._implicit is not None:
                yield Segment("close", self._implicit)
            self._field = field
            self._opened_at = None if found.match[0] else found.match.start()
            yield Segment("open", field, groups=groups)
        elif kind == "close":
            self._field = self._implicit
            yield Segment("close", field, groups=groups)

    def _next(self, ended: bool) -> tuple[_Found | None, int]:
        """The next marker, if it is certain which it is; else how far the text is certain to hold none."""
        best, certain = None, len(self._text)
        for watched in self._watched():
            match = self._search(watched.marker, partial=not ended)
            if match is None or self._is_spent(watched, match):
                continue
            if not ended and (match.partial or self._may_change(watched.marker, match)):
                certain = min(certain, match.start())
                continue
            found = _Found(watched, match)
            best = found if best is None or found.order < best.order else best
        if best is not None and best.match.start() >= certain:
            best = None
        return best, certain

    def _search(self, marker: Marker, *, partial: bool) -> regex.Match[str] | None:
        """The first match that isn't too long: what begins too early to be one is passed by."""
        start = self._place
        while match := marker.pattern.search(self._text, start, partial=partial):
            if match.end() - match.start() <= LONGEST:
                return match
            start = match.end() - LONGEST
        return None

    def _watched(self) -> Sequence[_Watched]:
        if self._field is self._implicit:
            return self._outside
        assert self._field is not None, "only the implicit field may be none"
        closing = [_Watched("close", self._field, self._field.close)] if self._field.close is not None else []
        return [*closing, *self._silent]

    def _is_spent(self, watched: _Watched, match: regex.Match[str]) -> bool:
        """A marker without text: whether it would be passed again and again in one place."""
        if match.partial or match[0]:
            return False
        return (watched.kind != "open" and self._field is self._implicit) or self._opened_at == match.start()

    def _may_change(self, marker: Marker, match: regex.Match[str]) -> bool:
        """Whether a match could be another if more text came; also one that looks for the end of the text."""
        if marker.is_final:
            return False
        if match.end() == len(self._text):
            return True
        longer = marker.pattern.fullmatch(self._text, match.start(), partial=True)
        if longer is not None:  # all that is there may be the beginning of a longer one
            return True
        again = marker.pattern.match(self._text + "\0", match.start())
        return again is None or again.span() != match.span() or again.groupdict() != match.groupdict()
