"""Stop strings: looked for while text comes in pieces, and held back while it may be the beginning of one.

This file knows strings and nothing of tokens.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Several strings looked for at once, whatever pieces the text comes in (Aho and Corasick, 1975).

    States are prefixes of the strings, state 0 the empty one. Being in a state means: it is the longest suffix of
    the text so far that begins any of the strings. The match that ends first wins; of several that end together,
    the longest.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]  # of each state: characters to hold back
        self.match: list[str | None] = [None]  # the longest string that ends in this state
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the longest proper suffix that is a state
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
    """The automaton for ``strings``; the same one for all who have use for it at a time, the prompts of a request."""
    key = tuple(strings)
    found = _STOP_STRINGS.get(key)
    if found is None:
        found = _STOP_STRINGS[key] = StopStrings(key)
    return found


_STOP_STRINGS: weakref.WeakValueDictionary[tuple[str, ...], StopStrings] = weakref.WeakValueDictionary()


class StopStringChecker:
    """One row's text on its way out: holds back what may be the beginning of a stop string, ends at the first match."""

    def __init__(self, stops: StopStrings, include_stop_str_in_output: bool = False) -> None:
        self.matched: str | None = None  # the stop string found, once one is
        self._stops = stops
        self._include = include_stop_str_in_output
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now. After a match (see ``matched``) nothing more ever is."""
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
        """What was held back: no more text will come."""
        held, self._held = self._held, ""
        return held
