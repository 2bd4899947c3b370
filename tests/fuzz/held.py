"""Selectors of a caller's own. Patient ones choose later, as stock's own loops do; rude ones return something
invalid."""

from __future__ import annotations

import random
from collections.abc import Callable

from paged_core import Engine, Selection


class Patient:
    """The TokenSelector of one lockstep group. It compares the logits with ``next_token`` of the whole row, and holds
    its rows."""

    def __init__(self, next_token: Callable[[list[int]], int | None]) -> None:
        self._next_token = next_token
        self._likeliest: dict[object, int] = {}

    def select(self, logits, requests):
        errors = {}
        for row, request in enumerate(requests):
            if logits[row].isnan().any():
                errors[row] = "the model's logits hold NaN"
                continue
            token = self._likeliest[request] = int(logits[row].argmax())
            if token != self._next_token(request.tokens):
                errors[row] = f"{token} is not what comes after {request.tokens}"
        return Selection([None] * len(requests), errors=errors or None)

    def prompt_logprobs(self, logits, next_ids, num):
        return ()

    def answer(self, engine: Engine, requests, rnd: random.Random):
        """Resume held rows, continuing one another's tokens if those are equally long, or end some. Returns the outputs
        of those ended."""
        full = [request for request in requests if len(request.tokens) + 1 >= request.max_total]
        if full or rnd.random() < 0.1:
            return [engine.stop(request) for request in full or requests[:1]]
        parents = list(range(len(requests)))
        if len({len(request.tokens) for request in requests}) == 1:
            parents = [rnd.randrange(len(requests)) for _ in requests]
        tokens = [self._likeliest[requests[parent]] if rnd.random() < 0.7 else rnd.randrange(90) for parent in parents]
        engine.resume(requests, tokens, parents if parents != list(range(len(requests))) else None)
        return []


class Rude:
    """A TokenSelector that returns something invalid after a few tokens."""

    def __init__(self, way: int) -> None:
        self._way, self._num_asked = way, 0

    def select(self, logits, requests):
        self._num_asked += 1
        if self._num_asked < 3:
            return Selection([1] * len(requests))
        answers = (
            Selection([-5] * len(requests)),
            Selection([10**6] * len(requests)),
            Selection([]),
            Selection([1] * (len(requests) + 1)),
            Selection([1] * len(requests), parents=[99] * len(requests)),
            "tokens",
        )
        if self._way == len(answers):
            raise KeyboardInterrupt
        return answers[self._way]

    def prompt_logprobs(self, logits, next_ids, num):
        return ()


NUM_RUDE_WAYS = 7
