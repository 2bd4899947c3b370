"""Requests that are sampled in every way, side by side, and logits for them."""

from __future__ import annotations

import torch

from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request

VOCAB = 2500
WAYS = [
    {"temperature": 0},
    {"temperature": 0.9},
    {"temperature": 0.05},
    {"min_p": 0.01},
    {"top_k": 40},
    {"top_k": 3, "top_p": 0.8},
    {"top_p": 0.9},
    {"top_p": 0.95, "temperature": 4.0},  # a nucleus of many hundreds of tokens
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "temperature": 0.8},
    {"logit_bias": {1: 3.0}, "bad_words_token_ids": [[3]], "top_k": 1000},
]


def rows(copies: int = 3) -> list[Request]:
    made = []
    for number in range(copies * len(WAYS)):
        params = SamplingParams(max_tokens=None, **WAYS[number % len(WAYS)])
        r = Request("r", [1, 2, 3], params, seed=number, index=number % 4)
        r.tokens += [5, 6, 5]
        made.append(r)
    return made


def logits_of(rows: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)) * scale


def select(logits, requests):
    return Sampler().select(logits.clone(), requests)


def choose(logits, requests, num_unknown=0):
    return Sampler().choose(logits, requests, num_unknown)
