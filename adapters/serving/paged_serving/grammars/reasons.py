"""What llguidance says of a grammar. Needs no llguidance: a server without it imports this too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance

_MAX_WHY = 300  # characters of what llguidance says: it quotes the grammar


def why(matcher: llguidance.LLMatcher) -> str:
    """A short form of llguidance's error message."""
    told: str = matcher.get_error()
    return told.partition("\n<")[0][:_MAX_WHY]
