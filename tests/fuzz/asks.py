"""Draws requests of clients from a random number generator: prompts with common beginnings, and every way to choose
tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from paged_core import SamplingParams

NUM_TOKENS = 90  # ids that prompts are made of
MOST_TOKENS = 16  # of any request
_WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy to the end": {"temperature": 0, "ignore_eos": True},
    "told": {"temperature": 0, "logprobs": 2},
    "told of the prompt": {"temperature": 0, "prompt_logprobs": 1, "logprobs": 0},
    "drawn": {"temperature": 0.8},
    "wide": {"temperature": 1.5, "min_p": 0.02},
    "top k": {"top_k": 5},
    "nucleus": {"top_p": 0.9, "temperature": 1.2},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "few": {"allowed_token_ids": [3, 5, 7, 11, 96], "temperature": 1.0},
    "biased": {"temperature": 0, "logit_bias": {1: 4.0, 96: 2.0}, "bad_words_token_ids": [[3], [1, 1]]},
    "not soon": {"temperature": 1.0, "min_tokens": 4, "logit_bias": {96: 6.0}},
    "stops": {"temperature": 1.3, "stop_token_ids": [2, 20, 40, 60, 80]},
    "nothing left": {"temperature": 0, "allowed_token_ids": [3], "bad_words_token_ids": [[3, 3]]},
    "edits": {"temperature": 0},
    "raises": {"temperature": 0.5},
    "exits": {"temperature": 0},
    "answers nonsense": {"temperature": 0},
    "beams": {"use_beam_search": True},
    "beams, at once": {"use_beam_search": True, "early_stopping": True, "length_penalty": 0.5},
}
_SALTS = (None, None, None, "", "", "a", "a", "b")


@dataclass(frozen=True)
class Ask:
    """One request, with the fields that its client sets."""

    prompt: tuple[int, ...]
    way: str
    n: int
    max_tokens: int
    seed: int
    salt: str | None = None
    priority: int = 0

    @property
    def beams(self) -> bool:
        return self.way.startswith("beams")

    def params(self, max_tokens: int | None = None) -> SamplingParams:
        return SamplingParams(
            n=self.n,
            max_tokens=max_tokens or self.max_tokens,
            seed=self.seed,
            cache_salt=self.salt,
            priority=self.priority,
            logits_processors=_processors(self),
            **_WAYS[self.way],
        )


def draw_ask(rnd: random.Random, chapter: str, told: Sequence[Sequence[int]]) -> Ask:
    """Draw a request. Requests of another ``chapter`` have other prompts. ``told``: rows that have ended, which new
    prompts may continue."""
    if told and rnd.random() < 0.05:
        history = rnd.choice(told)
        prompt = (*history[: rnd.randrange(1, len(history) + 1)], *_family(chapter, 0)[: rnd.randrange(3)])
    else:
        prompt = _family(chapter, rnd.randrange(2))[: rnd.choice((1, 5, 12, 16, 17, 33))]
    way = rnd.choice(tuple(_WAYS))
    return Ask(
        prompt,
        way,
        n=rnd.choice((2, 3)) if way.startswith("beams") else rnd.choice((1, 1, 1, 3)),
        max_tokens=rnd.choice((4, 9, MOST_TOKENS) if way == "not soon" else (1, 2, 5, 9, MOST_TOKENS)),
        seed=rnd.randrange(2) if _WAYS[way].get("temperature") != 0 else 0,
        salt=rnd.choice(_SALTS),
        priority=rnd.randrange(3),
    )


@lru_cache(100)
def _family(chapter: str, which: int) -> tuple[int, ...]:
    rnd = random.Random(f"{chapter}.{which}")
    return tuple(rnd.randrange(NUM_TOKENS) for _ in range(40))


def _processors(ask: Ask):
    length = len(ask.prompt)

    def edits(input_ids, scores):
        scores[:, int(input_ids[0, -1])] = float("-inf")
        return scores

    def raises(input_ids, scores):
        if input_ids.shape[1] - length == 3:
            raise RuntimeError("the client's own bug")
        return scores

    def exits(input_ids, scores):
        if input_ids.shape[1] - length == 2:
            raise SystemExit(3)
        return scores

    def answers_nonsense(input_ids, scores):
        return scores if input_ids.shape[1] - length < 2 else scores[:, :-1]

    return {"edits": [edits], "raises": [raises], "exits": [exits], "answers nonsense": [answers_nonsense]}.get(
        ask.way, []
    )
