"""Caches that a caller gives, asks for and gets back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    StaticCache,
)

from generate_parity import (
    ENDS,
    FULL,
    SHORT,
    Options,
    answer,
    assert_alike,
    assert_same,
    some_rows,
)
from paged_hf.upstream import CACHE, cache_in_result


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 3}, {"eos_token_id": ENDS}], ids=str)
def test_the_cache_that_comes_back_is_stocks_and_stock_goes_on_from_it(
    model: Any, patched: Any, rows: Options, mode: Options
) -> None:
    options = {**rows, **SHORT, **FULL, **mode}
    ours = assert_same(patched, **options, tier="native").result
    theirs = answer(patched.stock, (), options).result
    assert type(cache_in_result(ours)) is DynamicCache
    going_on = torch.cat([rows["attention_mask"], rows["attention_mask"].new_ones(4, 7)], 1)[
        :, : ours.sequences.shape[1]
    ]
    found = [
        answer(patched.stock, (each.sequences,), {
            "attention_mask": going_on, CACHE: cache_in_result(each), "pad_token_id": 0, "max_new_tokens": 5
        }).result
        for each in (ours, theirs)
    ]  # fmt: skip
    assert_alike(found[0], found[1], "continued")


def test_a_chat_that_goes_on_with_a_cache_of_the_callers_own(model: Any, patched: Any) -> None:
    first, _ = some_rows((9,))
    more, _ = some_rows((4,), seed=1)

    def chat(generate: Any) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        ids = generate(first, **{CACHE: cache}, max_new_tokens=5)
        assert cache.get_seq_length() == 13
        again = generate(torch.cat([ids, more], 1), **{CACHE: cache}, max_new_tokens=5)
        return [ids, again, cache.layers[0].keys]

    expected = chat(patched.stock)
    assert_alike(chat(patched), expected, "chat")
    assert patched.last_report().tier == "stock"


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, FULL], ids=str)
def test_no_cache(patched: Any, rows: Options, mode: Options) -> None:
    tier, loop = ("stock", "_beam_search") if "num_beams" in mode else ("native", None)
    assert_same(patched, **rows, **SHORT, use_cache=False, **mode, tier=tier, loop=loop)


def test_a_static_cache_gives_the_same_answers_and_comes_back(patched: Any, rows: Options) -> None:
    options = {**rows, **SHORT, "cache_implementation": "static", "disable_compile": True}
    assert_same(patched, **options, tier="native", loop="free")
    assert_same(patched, **options, num_beams=2, tier="native", loop="_beam_search")
    for mode in ({}, {"num_beams": 2}, {"eos_token_id": ENDS}):
        got = assert_same(patched, **options, **FULL, **mode, tier="native")
        assert type(cache_in_result(got.result)) is StaticCache


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_usual_answers_even_where_stocks_need_an_accelerator(
    patched: Any, rows: Options, kind: str
) -> None:
    got = answer(patched, (), {**rows, **SHORT, "cache_implementation": kind})
    if stock_makes_streams():
        assert got.error is None
        assert patched.last_report().tier == "native"
        assert_alike(got.result, patched.stock(**rows, **SHORT), "result")
    else:  # stock makes the cache before any loop is chosen
        assert isinstance(got.error, RuntimeError)
        assert answer(patched.stock, (), {**rows, **SHORT, "cache_implementation": kind}).error is not None


def stock_makes_streams() -> bool:
    """A torch that was built for a GPU can't where there is none. Its offloaded caches want one at once."""
    return torch.version.cuda is None or torch.cuda.is_available()


def test_a_quantized_cache_is_stocks_business(patched: Any, rows: Options) -> None:
    got = answer(patched, (), {**rows, **SHORT, "cache_implementation": "quantized"})
    expected = answer(patched.stock, (), {**rows, **SHORT, "cache_implementation": "quantized"})
    assert repr(got.error) == repr(expected.error)
    assert_alike(got.result, expected.result, "result")
