"""Greedy calls, and what may end one early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generate_parity import (
    ENDS,
    FULL,
    SHORT,
    Options,
    RecordingStreamer,
    assert_same,
    some_rows,
)
from paged_hf import paged_generate

# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", range(1, 9))
def test_greedy_rows_of_mixed_lengths_run_free_and_end_when_they_end(patched: Any, batch_size: int) -> None:
    ids, mask = some_rows((5, 17, 1, 30, 9, 2, 22, 13)[:batch_size], seed=batch_size)
    for ends in (None, ENDS, [ENDS[0]]):
        assert_same(
            patched,
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            eos_token_id=ends,
            pad_token_id=0,
            tier="native",
            loop="free",
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 1},
        {"max_length": 29},
        {"max_length": 27},
        {"max_length": 30, "max_new_tokens": 2},
        {"eos_token_id": ENDS},
        {"eos_token_id": 41},
        {"eos_token_id": ENDS, "pad_token_id": None},
        {"max_new_tokens": 9, "eos_token_id": ENDS, "pad_token_id": 77},
        {"eos_token_id": torch.tensor(ENDS)},
        {"cache_implementation": "dynamic"},
        {"disable_compile": True},
        {"synced_gpus": False},
        {"num_beams": 1, "early_stopping": False},
        {"output_scores": True},
        {"temperature": 0.5},
        {"use_cache": True},
        {"trust_remote_code": False},
        {"logits_to_keep": 1},
        {"max_time": None, "stop_strings": None, "prefix_allowed_tokens_fn": None},
    ],
    ids=str,
)
def test_plain_greedy_calls_run_free(patched: Any, rows: Options, options: Options) -> None:
    assert_same(patched, **{"pad_token_id": 0} | rows | options, tier="native", loop="free")


@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_sampling_draws_what_stock_draws(patched: Any, rows: Options, seed: int, num_samples: int, ends: Any) -> None:
    options = {"do_sample": True, "num_return_sequences": num_samples, "eos_token_id": ends, "max_new_tokens": 12}
    assert_same(patched, **rows, **options, pad_token_id=0, seed=seed, tier="native", loop="_sample")


@pytest.mark.parametrize("batch_size", range(1, 9))
def test_sampled_batches_of_any_size(patched: Any, batch_size: int) -> None:
    ids, mask = some_rows((5, 17, 1, 30, 9, 2, 22, 13)[:batch_size], seed=batch_size)
    options = {"do_sample": True, "eos_token_id": ENDS, "attention_mask": mask, **SHORT}
    assert_same(patched, ids, **options, **FULL, seed=batch_size, tier="native", loop="_sample")


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_prompts_of_many_steps(patched: Any) -> None:
    ids, mask = some_rows((240, 200, 3, 180, 220, 90, 10, 240))
    options = {"attention_mask": mask, **SHORT}
    assert_same(patched, ids, **options, tier="native", loop="free")
    assert_same(patched, ids, **options, do_sample=True, tier="native", loop="_sample")
    assert_same(patched, ids, **options, num_beams=2, tier="native", loop="_beam_search")


def test_calls_that_may_outgrow_the_models_positions_run_over_blocks(patched: Any) -> None:
    ids, mask = some_rows((250, 240))
    options = {"attention_mask": mask, "pad_token_id": 0}
    assert_same(patched, ids, **options, max_new_tokens=6, tier="native", loop="free")
    assert_same(patched, ids, **options, max_new_tokens=9, tier="cache", loop="_sample")
    assert_same(
        patched,
        ids[:1],
        max_new_tokens=9,
        fresh=lambda: {"streamer": RecordingStreamer()},
        tier="cache",
        loop="_sample",
    )


def test_more_rows_than_run_at_once(patched: Any, rows: Options) -> None:
    many = {name: tensor.repeat(66, 1) for name, tensor in rows.items()}
    assert_same(patched, **many, max_new_tokens=2, pad_token_id=0, tier="native", loop="free")
    assert_same(patched, **many, max_new_tokens=2, pad_token_id=0, do_sample=True, tier="cache", loop="_sample")


def test_a_budget_of_memory(model: Any, rows: Options) -> None:
    ids, mask = some_rows((100, 120, 90, 110))
    small = paged_generate(model, check=False, kv_cache_memory=64 << 10)  # 128 tokens
    assert_same(small, **rows, **SHORT, tier="native", loop="free")
    assert_same(small, ids[:, 10:], attention_mask=mask[:, 10:], **SHORT, tier="native", loop="free")
    assert_same(small, ids, attention_mask=mask, num_beams=4, **SHORT, tier="stock", loop="_beam_search")
    assert "raise kv_cache_bytes" in small.last_report().reason
    strict = paged_generate(model, check=False, kv_cache_memory=64 << 10, over_budget="raise")
    with pytest.raises(ValueError, match="raise kv_cache_bytes"):
        strict(ids, attention_mask=mask, num_beams=4, **SHORT)
    assert_same(strict, **rows, **SHORT, tier="native", loop="free")


def test_a_prompt_computed_in_chunks_of_the_callers_choice(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, **SHORT, prefill_chunk_size=4, tier="cache", loop="_sample")


def test_autocast(patched: Any, rows: Options) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(patched, **rows, **SHORT, tier="cache", loop="_sample")
