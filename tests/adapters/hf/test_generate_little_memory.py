"""Calls that share too little K/V memory: they preempt and wait for one another, or go to stock."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from concurrent_calls import (
    SMALL,
    Collecting,
    host_of,
    prompt,
    step_when_all_are_there,
    together,
    tokens,
)
from paged_hf import paged_generate
from paged_hf.generate import report

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

BLOCK_BYTES = 2 * 2 * 2 * 8 * 8 * 4  # layers, K and V, heads, slots, head dim, bytes


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_preempt_and_wait_for_one_another_all_end_with_the_right_tokens(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model = tiny("llama", **SMALL)
    model.generate = paged_generate(model, kv_cache_memory=(14 + 3 * seed) * BLOCK_BYTES, check=False)
    step_when_all_are_there(host_of(model), 14, monkeypatch)
    draw = random.Random(seed)
    calls, expected = [], []
    for number in range(14):
        rows = draw.randint(1, 3)
        given = {**prompt(draw.randrange(99), rows), "max_new_tokens": draw.randint(6, 30), "do_sample": False}
        given |= draw.choice([{}, {}, {"repetition_penalty": 1.2}, {"num_beams": 2} if rows == 1 else {}])
        if rows == 1 and number % 3 == 0:
            given["streamer"] = None if "num_beams" in given else Collecting()
        expected.append(tokens(model.generate.stock(**given)))

        def call(given: dict[str, Any] = given) -> Any:
            return tokens(model.generate(**given)), model.generate.last_report()

        calls.append(call)
    answers = together(calls)
    assert [answer[0] for answer in answers] == expected
    assert {answer[1].tier for answer in answers} == {"native"}
    engine = host_of(model).engine
    assert engine.last_stats.total_preemptions > 0
    assert engine.memory.num_blocks_used == 0
    engine.check()


@pytest.mark.parametrize("kv_cache_memory", [5 * BLOCK_BYTES, 10])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["free", "lockstep"])
def test_a_call_larger_than_the_budget_goes_to_stock_with_a_warning_or_raises(
    tiny: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kv_cache_memory: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(report, "_warned", set())
    model = tiny("llama", **SMALL)
    given = {**prompt(1), "max_new_tokens": 60, "do_sample": False, **options}
    patched = paged_generate(model, kv_cache_memory=kv_cache_memory, check=False)
    answer = patched(**given)
    assert patched.last_report().tier == "stock"
    assert patched.last_report().reason in caplog.text
    assert torch.equal(answer, patched.stock(**given))
    strict = paged_generate(model, kv_cache_memory=kv_cache_memory, over_budget="raise", check=False)
    with pytest.raises(ValueError, match="block"):
        strict(**given)
    if kv_cache_memory > BLOCK_BYTES:
        strict(**prompt(2), max_new_tokens=3, do_sample=False)
        assert strict.last_report().tier == "native"
    assert strict.tiers.host.engine is None or strict.tiers.host.engine.memory.num_blocks_used == 0
