"""The quality cost of quantised weights: perplexity on a fixed text, and how often the most likely next token
changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paged_bench.passage import PASSAGE
from paged_core import Engine, EngineConfig, SamplingParams
from paged_hf.loading import load


@dataclass(frozen=True)
class Quality:
    """The engine with unchanged and with quantised weights, on the same tokens."""

    weights: str
    num_tokens: int
    perplexity_plain: float
    perplexity: float
    same_likeliest: float  # share of positions with the same most likely token

    @property
    def change(self) -> float:
        """Of the perplexity, as a share."""
        return self.perplexity / self.perplexity_plain - 1


def measure(model: Any, source: Any, config: EngineConfig) -> Quality | None:
    """Measures a live model; None if it has no tokenizer."""
    tokenizer = load.load_tokenizer(source)
    if tokenizer is None or config.weights is None:
        return None
    ids = list(tokenizer.encode(PASSAGE))
    plain, ours = (_told(model, replace(config, weights=kind), ids) for kind in (None, config.weights))
    same = sum(a == b for a, b in zip(plain[1], ours[1], strict=True)) / len(ours[1])
    return Quality(config.weights, len(ids), _perplexity(plain[0]), _perplexity(ours[0]), same)


def _told(model: Any, config: EngineConfig, ids: Sequence[int]) -> tuple[list[float], list[int]]:
    """Log probabilities of the text's tokens from the second on, and the likeliest token at each place."""
    engine = Engine(model, config)
    try:
        ids = ids[: engine.sizes.max_model_len - 1]
        engine.add_request("passage", ids, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1))
        told: Sequence[Mapping[int, Any] | None] = ()
        while engine.has_work:
            for output in engine.step():
                told = output.prompt_logprobs or told
    finally:
        engine.close()
    places = [place for place in told if place is not None]
    likeliest = [max(place, key=lambda token: place[token].logprob) for place in places]
    return [place[token].logprob for place, token in zip(places, ids[1:], strict=True)], likeliest


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))
