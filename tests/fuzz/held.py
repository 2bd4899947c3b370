"""Groups whose caller chooses their tokens himself, later: as beam search and stock's own loops do."""

from __future__ import annotations

import random
from collections.abc import Callable

from paged_core import Engine, Selection


class Patient:
    """The TokenSelector of one lockstep group. It compares what it is given with ``next_token`` of the whole row, and
    has its rows held."""

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
        """Go on with rows that are held, from one another's histories where those are equally long; or end some.
        Returns the outputs of those ended."""
        full = [request for request in requests if len(request.tokens) + 1 >= request.max_total]
        if full or rnd.random() < 0.1:
            return [engine.stop(request) for request in full or requests[:1]]
        parents = list(range(len(requests)))
        if len({len(request.tokens) for request in requests}) == 1:
            parents = [rnd.randrange(len(requests)) for _ in requests]
        tokens = [self._likeliest[requests[parent]] if rnd.random() < 0.7 else rnd.randrange(90) for parent in parents]
        engine.resume(requests, tokens, parents if parents != list(range(len(requests))) else None)
        return []
