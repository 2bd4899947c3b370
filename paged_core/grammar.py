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

from paged_core.errors import InvalidRequestError, PluginError
from paged_core.text import TextCodec

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

    def processor(self, kind: str, value: Any, num_prompt: int) -> GrammarProcessor:
        """A logits processor for all samples of one prompt of ``num_prompt`` tokens. ``kind`` is "json" (a schema),
        "regex", "choice" (strings) or "grammar" (Lark or GBNF).

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
        if kind == "choice":  # spelt here, because llguidance escapes what isn't ASCII, and reads no such escapes
            kind, text = "grammar", "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in value)
        try:
            matcher = llguidance.LLMatcher(self._vocabulary(), llguidance.grammar_from(_FORMATS[kind], text))
        except ValueError as error:
            raise InvalidRequestError(f"the grammar can't be read: {error}") from error
        if matcher.is_error():
            raise InvalidRequestError(f"the grammar can't be used: {matcher.get_error()}")
        return GrammarProcessor(matcher, num_prompt)

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

    def __init__(self, matcher: Any, num_prompt: int) -> None:
        self._start = matcher
        self._num_prompt = num_prompt
        self._states: dict[tuple[int, ...], Any] = {}  # output tokens -> the matcher after them; the latest ones

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        state = self._state(tuple(input_ids[0, self._num_prompt :].tolist()))
        if state.is_error():
            raise RuntimeError(f"the grammar can't be followed: {state.get_error()}")
        allowed = torch.frombuffer(bytearray(state.compute_logit_bias()), dtype=torch.uint8)  # [V], 0: forbidden
        return scores.masked_fill(allowed[: scores.shape[-1]].to(scores.device) == 0, float("-inf"))

    def _state(self, output: tuple[int, ...]) -> Any:
        if output not in self._states:
            before = self._states.get(output[:-1])
            state = (before or self._start).deep_copy()
            state.consume_tokens(list(output[-1:] if before is not None else output))
            self._states[output] = state
            if len(self._states) > _MAX_STATES:
                del self._states[next(iter(self._states))]
        return self._states[output]


_MAX_STATES = 512  # two steps of the most samples that a prompt usually has; those that fall out are made again


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
