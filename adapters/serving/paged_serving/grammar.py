"""Answers that must follow a grammar: JSON schemas, regular expressions, choices, Lark and GBNF grammars.

llguidance knows grammars; here it is made a logits processor. It is imported when the first grammar is asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paged_core import InvalidRequestError, PluginError, TextCodec

_FORMATS: dict[str, Any] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


class Grammars:
    """Compiles grammars for one tokenizer. Callable from any thread.

    ``vocab_size``: columns of the logits; ``eos_token_ids``: allowed where the grammar is fulfilled.
    """

    def __init__(self, codec: TextCodec, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._codec = codec
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None  # the vocabulary as llguidance wants it

    def processor(self, kind: str, value: Any, num_prompt: int, num_rows: int) -> GrammarProcessor:
        """A logits processor for all ``num_rows`` samples of one prompt of ``num_prompt`` tokens. ``kind`` is "json"
        (a schema), "regex", "choice" (strings) or "grammar" (Lark or GBNF).

        Raises:
            InvalidRequestError: it isn't such a grammar.
            PluginError: llguidance isn't installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise PluginError("structured output needs llguidance: pip install 'paged-core[server]'") from error
        if not self._eos_token_ids:
            raise InvalidRequestError("structured output needs a model with an end-of-sequence token")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if kind == "choice":
            # Spelt here, because llguidance escapes what isn't ASCII, and reads no such escapes. One terminal: of
            # thousands of rules it would take none.
            kind = "grammar"
            text = "start: ANY\nANY: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in value)
        if len(text) > _MAX_TEXT:
            raise InvalidRequestError(f"the grammar has {len(text)} characters; at most {_MAX_TEXT} are taken")
        try:
            matcher = llguidance.LLMatcher(self._vocabulary(), llguidance.grammar_from(_FORMATS[kind], text))
        except ValueError as error:
            raise InvalidRequestError(f"the grammar can't be read: {error}") from error
        if matcher.is_error():
            raise InvalidRequestError(f"the grammar can't be used: {_why(matcher)}")
        return GrammarProcessor(matcher, num_prompt, num_rows)

    def _vocabulary(self) -> Any:
        import llguidance

        with self._lock:
            if self._tokens is None:
                wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._codec, self._vocab_size, self._eos_token_ids))
                self._tokens = llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
            return self._tokens


class GrammarProcessor:
    """Forbids every token that would break the grammar. Its state is a function of the row's own tokens, so that
    samples of one prompt may share it, and a preempted row finds it again."""

    def __init__(self, matcher: Any, num_prompt: int, num_rows: int) -> None:
        self._start = matcher
        self._num_prompt = num_prompt
        self._max_states = int(num_rows * _STATES_PER_ROW)
        self._states: dict[tuple[int, ...], Any] = {}  # output tokens -> the matcher after them; last used, last

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        state = self._state(tuple(input_ids[0, self._num_prompt :].tolist()))
        allowed = torch.frombuffer(bytearray(state.compute_logit_bias()), dtype=torch.uint8)  # [V], 0: forbidden
        if state.is_error():
            raise InvalidRequestError(f"the grammar can't be followed: {_why(state)}")
        scores = scores.masked_fill(allowed[: scores.shape[-1]].to(scores.device) == 0, float("-inf"))
        if scores.max() == float("-inf"):
            raise InvalidRequestError(
                "no token is left to choose: what the structure needs here is forbidden by allowed_token_ids, "
                "bad_words or min_tokens; leave one of them out"
            )
        return scores

    def _state(self, output: tuple[int, ...]) -> Any:
        state = self._states.pop(output, None)
        if state is None:
            before = self._states.pop(output[:-1], None)
            state = (before or self._start).deep_copy()
            state.consume_tokens(list(output[-1:] if before is not None else output))
            if before is not None:  # other samples may be where this one was
                self._states[output[:-1]] = before
        self._states[output] = state
        while len(self._states) > self._max_states:
            del self._states[next(iter(self._states))]
        return state


_STATES_PER_ROW = 2  # where it is, and where it was a step ago; those that fall out are made again if need be
_MAX_TEXT = 262_144  # characters of a grammar: a second's work
_MAX_WHY = 300  # characters of what llguidance says: it quotes the grammar, and adds its own state


def _why(matcher: Any) -> str:
    told: str = matcher.get_error()
    return told.partition("\n<state>")[0][:_MAX_WHY]


class _Vocabulary:
    """A tokenizer in the form that llguidance wraps."""

    bos_token_id = None

    def __init__(self, codec: TextCodec, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._codec = codec
        self.eos_token_id = eos_token_ids[0]
        self.tokens = [codec.token_bytes(token) for token in range(vocab_size)]
        special = getattr(codec.tokenizer, "all_special_ids", None) or ()
        self.special_token_ids = sorted({*special, *eos_token_ids})

    def __call__(self, text: str) -> list[int]:
        return self._codec.encode(text, add_special_tokens=False)
