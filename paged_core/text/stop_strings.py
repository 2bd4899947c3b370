"""Finds stop strings in text that comes in pieces, and holds back text that may be the beginning of one.

This file knows strings, and nothing of tokens.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Searches for several strings at once, in text that comes in any pieces (Aho and Corasick, 1975).

    States are prefixes of the strings; state 0 is the empty prefix. The automaton's state is the longest suffix of the
    text so far that is a prefix of any string. The match that ends first wins; of several that end together, the
    longest.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]  # by state: characters to hold back
        self.match: list[str | None] = [None]  # by state: the longest string that ends there, or None
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # by state: its longest proper suffix that is a state
        for string in strings:
            self._add(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self.depth)
                self.depth.append(depth)
                self.match.append(None)
                self._next.append({})
                self._fallback.append(0)
            state = self._next[state][character]
        self.match[state] = string

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                self.match[child] = self.match[child] or self.match[self._fallback[child]]
                queue.append(child)


def stop_strings(strings: Sequence[str]) -> StopStrings:
    """Return the automaton for ``strings``. Requests that use the same strings at the same time share it."""
    key = tuple(strings)
    found = _STOP_STRINGS.get(key)
    if found is None:
        found = _STOP_STRINGS[key] = StopStrings(key)
    return found


_STOP_STRINGS: weakref.WeakValueDictionary[tuple[str, ...], StopStrings] = weakref.WeakValueDictionary()


class StopStringChecker:
    """Checks one row's text: holds back what may begin a stop string, and ends at the first match."""

    def __init__(self, stops: StopStrings, include_stop_str_in_output: bool = False) -> None:
        self.matched: str | None = None  # the stop string found, or None
        self._stops = stops
        self._include = include_stop_str_in_output
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that may be returned now. After a match (see ``matched``), that is always nothing."""
        if self.matched is not None:
            return ""
        for position, character in enumerate(text, start=1):
            self._state = self._stops.step(self._state, character)
            self.matched = self._stops.match[self._state]
            if self.matched is not None:
                seen = self._held + text[:position]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(self.matched)]
        seen = self._held + text
        num_held = 0 if self._include else self._stops.depth[self._state]
        self._held = seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held]

    def flush(self) -> str:
        """Return the text that was held back, because no more will come."""
        held, self._held = self._held, ""
        return held
