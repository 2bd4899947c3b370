"""Rows for tests of samplers: requests with some output, and logits for them."""

from __future__ import annotations

import torch

from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request

NINF = float("-inf")


def request(prompt=(1, 2), output=(), *, seed=0, index=0, stop=(), **params) -> Request:
    params.setdefault("max_tokens", None)
    made = Request("r", prompt, SamplingParams(**params), seed=seed, index=index, stop_token_ids=frozenset(stop))
    made.tokens.extend(output)
    return made


def logits_of(rows: int, vocab: int = 300, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def select(logits: torch.Tensor, requests, sampler=None):
    return (sampler or Sampler()).select(logits.clone(), requests)


def greedy_token(logits: torch.Tensor, **kwargs) -> int:
    return select(logits[None], [request(temperature=0, **kwargs)]).token_ids[0]
