"""The logits processor that keeps one row to its grammar, by llguidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paged_core import InvalidRequestError
from paged_serving.grammars.bounded import BoundedThread, TooSlow
from paged_serving.grammars.reasons import why

_NINF = float("-inf")


class CompiledGrammar:
    """A compiled grammar, shared by all that follow it.

    Copies of a matcher share its lexer: the limits of its states count for all of them together, and a slow step of
    one makes the others wait. So a row that reaches a limit continues with a new matcher of its own, and a grammar that
    was too slow once ends its rows.
    """

    def __init__(self, compile_anew: Callable[[], Any]) -> None:
        self._compile_anew = compile_anew
        self._start = compile_anew()
        self.too_slow = False
        self.worn = False  # its lexer has reached a limit

    def matcher(self, *, fresh: bool = False) -> Any:
        if fresh:
            self.worn = True
            return self._compile_anew()
        return self._start.deep_copy()


class GrammarProcessor:
    """Forbids every token that would break the grammar. Its state is a function of the row's own tokens, so that a
    preempted row can continue.

    ``num_prompt``: tokens that stand before the row's own.
    """

    def __init__(self, grammar: CompiledGrammar, num_prompt: int, thread: BoundedThread) -> None:
        self._grammar, self._num_prompt, self._thread = grammar, num_prompt, thread
        self._matcher: Any = None
        self._seen: list[int] = []  # the tokens that it has taken in
        self._fresh = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        output: list[int] = input_ids[0, self._num_prompt :].tolist()
        allowed = torch.frombuffer(bytearray(self._bias(output)), dtype=torch.uint8)  # [V], 0: forbidden
        scores = scores.masked_fill(allowed[: scores.shape[-1]].to(scores.device) == 0, _NINF)
        if scores.max() == _NINF:
            raise InvalidRequestError(
                "no token is left to choose: what the structure needs here is forbidden by allowed_token_ids, "
                "bad_words or min_tokens; leave one of them out"
            )
        return scores

    def _bias(self, output: list[int]) -> bytes:
        try:
            if self._grammar.too_slow:
                raise TooSlow
            return self._thread.call(lambda: self._follow(output))
        except TooSlow:
            self._grammar.too_slow = True
            raise InvalidRequestError("the grammar can't be followed: one of its steps takes too long") from None

    def _follow(self, output: list[int]) -> bytes:
        bias = self._step(output)
        if self._matcher.is_error() and not self._fresh:
            self._fresh, self._matcher = True, None
            bias = self._step(output)
        if self._matcher.is_error():
            raise InvalidRequestError(f"the grammar can't be followed: {why(self._matcher)}")
        return bias

    def _step(self, output: list[int]) -> bytes:
        """One byte for each token, 0: forbidden. In an error state, whatever."""
        if self._matcher is None or output[: len(self._seen)] != self._seen:
            self._matcher, self._seen = self._grammar.matcher(fresh=self._fresh), []
        new = output[len(self._seen) :]
        if new:
            self._matcher.consume_tokens(new)
        self._seen = output
        bias: bytes = self._matcher.compute_logit_bias()
        return bias
