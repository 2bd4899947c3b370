"""The ways to give a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generate_parity import (
    ENDS,
    FULL,
    SHORT,
    Options,
    answer,
    assert_same,
    some_rows,
)
from paged_hf import paged_generate


def test_prompts_without_a_mask(patched: Any, own: Any) -> None:
    ids, _ = some_rows((9, 9, 9))
    assert_same(patched, ids, max_new_tokens=5, tier="native", loop="free")
    assert_same(patched, ids, max_new_tokens=5, num_beams=2, tier="native", loop="_beam_search")
    padded, _ = some_rows((9, 4, 7))
    assert_same(patched, padded, max_new_tokens=5, pad_token_id=0, tier="native", loop="free")
    assert_same(patched, padded, max_new_tokens=5, pad_token_id=3, tier="native", loop="free")
    own.generation_config.pad_token_id = None
    assert_same(patched, padded, max_new_tokens=5, eos_token_id=88, tier="native", loop="free")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, {"eos_token_id": ENDS}, FULL], ids=str)
def test_ids_of_any_integer_type(patched: Any, rows: Options, dtype: torch.dtype, mode: Options) -> None:
    options = {**rows, "inputs": rows["inputs"].to(dtype), **SHORT, **mode}
    assert_same(patched, **options, tier="native")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(patched: Any, rows: Options, dtype: torch.dtype) -> None:
    options = {**rows, "attention_mask": rows["attention_mask"].to(dtype), **SHORT}
    assert_same(patched, **options, tier="native", loop="free")
    assert_same(patched, **options, num_beams=2, tier="native", loop="_beam_search")


def test_prompts_by_position_by_name_and_none_at_all(patched: Any, rows: Options) -> None:
    ids, mask = rows["inputs"], rows["attention_mask"]
    assert_same(patched, ids, None, attention_mask=mask, **SHORT, tier="native", loop="free")
    assert_same(patched, input_ids=ids, attention_mask=mask, **SHORT, tier="native", loop="free")
    assert_same(patched, **SHORT, tier="native", loop="free")
    assert_same(patched, **SHORT, do_sample=True, num_return_sequences=3, tier="native", loop="_sample")
    assert_same(patched, bos_token_id=8, **SHORT, tier="native", loop="free")
    assert_same(patched, ids, input_ids=ids, **SHORT, tier=None)
    assert_same(patched, ids[:, :0], attention_mask=mask[:, :0], **SHORT, tier=None)


def test_position_ids(patched: Any, rows: Options) -> None:
    mask = rows["attention_mask"]
    usual = mask.cumsum(-1) - 1
    assert_same(patched, **rows, **SHORT, position_ids=usual.clamp(min=0), tier="native", loop="free")
    assert_same(patched, **rows, **SHORT, position_ids=usual.masked_fill(mask == 0, 1), tier="native", loop="free")
    ids, _ = some_rows((9, 9))
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9).expand(2, 9), tier="native", loop="free")
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9)[None], tier="native", loop="free")
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9)[None] * 2, tier="cache", loop="_sample")
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9).expand(2, 9) + 5, tier="cache", loop="_sample")


def test_a_mask_or_positions_of_more_rows_than_the_prompts_fail_as_stock_fails(patched: Any, rows: Options) -> None:
    ids, _ = some_rows((9, 9))
    for odd in ({"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(9).expand(2, 9)}):
        for prompts, name in ((ids[:1], "one row"), (ids.repeat(2, 1), "four rows")):
            expected = answer(patched.stock, (prompts,), {**odd, **SHORT})
            assert expected.error is not None, name
            assert repr(answer(patched, (prompts,), {**odd, **SHORT}).error) == repr(expected.error), name


def test_odd_masks_run_over_blocks_as_stock_runs_them(patched: Any, rows: Options) -> None:
    ids, mask = some_rows((9, 5, 7))
    assert_same(patched, ids.flip(1), attention_mask=mask.flip(1), **SHORT, tier="cache", loop="_sample")
    holes = torch.ones_like(ids)
    holes[:, 3:5] = 0
    options = {"attention_mask": holes, **SHORT}
    assert_same(patched, ids, **options, tier="cache", loop="_sample")
    assert_same(patched, ids, **options, **FULL, num_beams=2, tier="cache", loop="_beam_search")
    assert_same(patched, ids, **options, do_sample=True, num_return_sequences=2, tier="cache", loop="_sample")
    assert_same(patched, ids, **SHORT, attention_mask=torch.zeros_like(ids), tier="cache", loop="_sample")
    assert_same(patched, ids, **SHORT, attention_mask=holes[:, None], tier=None)
    wrong = torch.cat([torch.ones_like(ids), torch.ones_like(ids)], 1)
    assert_same(patched, ids, **SHORT, attention_mask=wrong, tier="cache", loop="_sample")


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_masks_that_say_more_than_yes_and_no_run_over_blocks(patched: Any, rows: Options, value: float) -> None:
    mask = rows["attention_mask"]
    for odd in (mask * value, mask.float().masked_fill(mask == 0, value)):
        assert_same(patched, rows["inputs"], attention_mask=odd, **SHORT, tier="cache", loop="_sample")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_ids_of_other_types_are_refused_as_stock_refuses_them(patched: Any, rows: Options, dtype: torch.dtype) -> None:
    options = {**rows, **SHORT, "inputs": rows["inputs"].to(dtype)}
    expected = answer(patched.stock, (), options)
    assert isinstance(expected.error, RuntimeError)
    assert repr(answer(patched, (), options).error) == repr(expected.error)


@pytest.mark.parametrize("over_budget", ["stock", "raise"])
def test_token_ids_that_the_model_has_not(model: Any, rows: Options, over_budget: str) -> None:
    strict = paged_generate(model, check=False, over_budget=over_budget)
    assert_same(strict, **rows, **SHORT, eos_token_id=[*ENDS, 999, -1], tier="native", loop="free")
    unknown = rows["inputs"].clone()
    unknown[0, -1] = 500
    for form in ({}, {"do_sample": True}, {"num_beams": 2}):
        options = {**rows, **SHORT, **form, "inputs": unknown}
        expected = answer(strict.stock, (), options)
        assert isinstance(expected.error, IndexError)
        assert repr(answer(strict, (), options).error) == repr(expected.error)


def test_tensors_of_inference_mode_are_marked_as_stock_marks_them(patched: Any, rows: Options) -> None:
    with torch.inference_mode():
        assert_same(patched, **rows, **SHORT, tier="native", loop="free")
        assert_same(patched, **rows, **SHORT, **FULL, tier="native", loop="_sample")
    assert_same(patched, **rows, **SHORT, **FULL, num_beams=2, tier="native", loop="_beam_search")


def test_inputs_embeds(model: Any, patched: Any, rows: Options) -> None:
    embeds = model.get_input_embeddings()(rows["inputs"]).detach() * 1.3  # those of no token
    options = {"inputs_embeds": embeds, "attention_mask": rows["attention_mask"], **SHORT}
    assert_same(patched, **options, tier="native", loop="_sample")
    assert_same(patched, **options, **FULL, num_beams=2, tier="native", loop="_beam_search")
    assert_same(patched, rows["inputs"], **options, do_sample=True, tier="native", loop="_sample")
