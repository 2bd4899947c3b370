"""Greedy requests of all lengths at once, some with a common prefix, some with several samples; and what dense
attention gives for each. On a small cache they preempt each other."""

import random

import pytest

from paged_core import SamplingParams

ROOMY = {"num_blocks": 400, "max_num_batched_tokens": 256}
CHUNKED = {"num_blocks": 400, "max_num_batched_tokens": 8}
TIGHT = {"num_blocks": 26, "max_num_batched_tokens": 16}  # so small that requests are preempted

in_every_size = pytest.mark.parametrize("config", [ROOMY, CHUNKED, TIGHT], ids=["roomy", "chunked", "tight"])


def in_every_way(test):
    for mark in (
        pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-cache"]),
        pytest.mark.parametrize("window", [None, 10], ids=["full", "windowed"]),
        in_every_size,
    ):
        test = mark(test)
    return test


def greedy(num_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=num_tokens, **{"ignore_eos": True, **more})


def add_mixed_requests(engine, model):
    """Add the requests. Returns the expected tokens of each row by (id, index)."""
    rnd, truth = random.Random(1), {}
    for i in range(14):
        prompt = [rnd.randrange(90) for _ in range(rnd.randrange(1, 40))]
        if i % 3 == 0:
            prompt = list(range(12)) + prompt[:5]
        num_tokens = rnd.randrange(1, 30)
        engine.add_request(str(i), prompt, greedy(num_tokens, n=1 + i % 3))
        truth |= dict.fromkeys(((str(i), row) for row in range(1 + i % 3)), model.generate(prompt, num_tokens))
    return truth
