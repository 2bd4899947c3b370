"""A wrapper of llguidance: the vocabulary in its form, and grammars compiled within limits. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import llguidance

_Encode = Callable[[str], list[int]]
# The fuel of a step bounds its time, whatever the load of the machine: this much burns in about 15 ms. A step of a
# grammar that means no harm takes less than 1 ms.
_LIMITS = llguidance.LLParserLimits(
    max_lexer_states=50_000, step_lexer_fuel=30_000, step_max_items=50_000, verbose_errors=False
)
_MAX_FORCED = 512  # characters of what a grammar forces: we use the first token of it
_LONGEST = 32  # bytes of a token


class Vocabulary(NamedTuple):
    """A tokenizer in the form that llguidance wraps, as far as it can be sent to another process."""

    tokens: Sequence[bytes]  # by token id
    eos_token_ids: Sequence[int]
    special_token_ids: Sequence[int]


def make_tokenizer(vocabulary: Vocabulary, encode: _Encode | None = None) -> llguidance.LLTokenizer:
    """``encode``: text to token ids; None: a greedy longest match, good enough for a trial."""
    wrapper = llguidance.TokenizerWrapper(_Wrapped(vocabulary, encode))
    eos = list(vocabulary.eos_token_ids)
    return llguidance.LLTokenizer(wrapper, n_vocab=len(vocabulary.tokens), eos_token=eos)


def compile_grammar(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher whose first mask has been computed, which may take as long as all else: copies share what it cost."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


class _Wrapped:
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: _Encode | None) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_token_ids
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self._encode = encode or self._greedy
        self._ids = {token: number for number, token in enumerate(vocabulary.tokens)}

    def __call__(self, text: str) -> list[int]:
        """Tokenise only the beginning of a long text: llguidance asks in each step for up to 250,000 bytes that a
        grammar forces."""
        return self._encode(text[:_MAX_FORCED])

    def _greedy(self, text: str) -> list[int]:
        rest, found = text.encode(), []
        while rest:
            size = next((size for size in range(_LONGEST, 0, -1) if rest[:size] in self._ids), 0)
            if not size:
                break
            found.append(self._ids[rest[:size]])
            rest = rest[size:]
        return found
