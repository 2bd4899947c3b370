"""Follows a compiled grammar some tokens deep, as rows would: a grammar may begin harmlessly and explode later."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paged_serving.grammars.reasons import why

if TYPE_CHECKING:
    import llguidance

_NUM_WALKS = 3
_DEPTH = 16  # tokens of a walk


def trouble_ahead(matcher: llguidance.LLMatcher, compile_anew: Callable[[], llguidance.LLMatcher]) -> str | None:
    """The error that a row would meet on one of a few walks through random allowed tokens; None: they met none. The
    same grammar gets the same walks.

    ``matcher``: at the beginning. Copies share the states of its lexer, so a walk that fails is repeated on a matcher
    of its own, as for a row (``GrammarProcessor``).
    """
    draw = random.Random(0)
    for _ in range(_NUM_WALKS):
        copy = matcher.deep_copy()
        path = _walk(copy, draw)
        if copy.is_error():
            alone = compile_anew()
            _repeat(alone, path)
            if alone.is_error():
                return why(alone)
    return None


def _walk(matcher: llguidance.LLMatcher, draw: random.Random) -> list[int]:
    """The tokens that it took."""
    path: list[int] = []
    while len(path) < _DEPTH and not _is_over(matcher):
        token = _some_token(matcher.compute_bitmask(), draw)
        if token is None:
            break
        path.append(token)
        matcher.consume_token(token)
    return path


def _repeat(matcher: llguidance.LLMatcher, path: Sequence[int]) -> None:
    """Computes the mask before each token: a limit that it exceeds is an error of the token that follows."""
    for token in path:
        if not _is_over(matcher):
            matcher.compute_bitmask()
            matcher.consume_token(token)


def _is_over(matcher: llguidance.LLMatcher) -> bool:
    return bool(matcher.is_error() or matcher.is_stopped())


def _some_token(mask: bytes, draw: random.Random) -> int | None:
    """One of the tokens whose bit is set, the first after a random place; None: there is none."""
    start = draw.randrange(len(mask))
    turned = mask[start:] + mask[:start]
    place = len(turned) - len(turned.lstrip(b"\0"))
    if place == len(turned):
        return None
    bit = draw.choice([bit for bit in range(8) if turned[place] >> bit & 1])
    return 8 * ((start + place) % len(mask)) + bit
