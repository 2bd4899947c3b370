"""A layer of the paged cache beside one of stock's DynamicCache: whatever happens to both, they hold the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer

from paged_hf.cache.block_tables import BlockTables
from paged_hf.cache.paged_cache import PagedCache, PagedLayer


class Pair:
    """A paged layer and stock's, to which the same happens. K and V differ in their head dim."""

    def __init__(self, block_size: int, num_rows: int = 2) -> None:
        self.layers = (DynamicLayer(), PagedLayer(block_size))
        self.num_rows = num_rows
        self.generator = torch.Generator().manual_seed(0)

    def update(self, num_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        keys, values = (
            torch.randn(self.num_rows, 3, num_tokens, width, generator=self.generator).to(dtype) for width in (4, 2)
        )
        results = [layer.update(keys, values) for layer in self.layers]
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)

    def both(self, method: str, *args: Any) -> None:
        for layer in self.layers:
            getattr(layer, method)(*args)

    def check(self) -> None:
        stock, paged = self.layers
        assert paged.get_seq_length() == stock.get_seq_length()
        assert paged.get_mask_sizes(3) == stock.get_mask_sizes(3)
        torch.testing.assert_close((paged.keys, paged.values), (stock.keys, stock.values), rtol=0, atol=0)
        paged.tables.check()


_OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(0, 5)),
    st.tuples(st.just("crop"), st.integers(-9, -1)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["reorder", "keep", "mask"]), st.integers(0, 2**16)),
)


@settings(max_examples=100)
@given(st.integers(1, 8), st.integers(1, 3), st.lists(_OPERATIONS, min_size=4, max_size=16))
@example(4, 2, [("reorder", 0), ("update", 1)])
def test_whatever_happens_a_layer_is_stocks_and_no_block_is_lost(
    block_size: int, num_rows: int, operations: list[tuple[str, int]]
) -> None:
    pair = Pair(block_size, num_rows)
    pair.update(3)
    for name, number in operations:
        digits = [number // pair.num_rows**i % pair.num_rows for i in range(pair.num_rows)]
        if name == "update":
            pair.update(number)
        elif name == "crop":
            pair.both("crop", max(number, -pair.layers[0].get_seq_length() or -1))
        elif pair.layers[0].get_seq_length() == 0:
            continue
        elif name == "repeat" and pair.num_rows * number <= 6:
            pair.both("batch_repeat_interleave", number)
            pair.num_rows *= number
        elif name == "reorder":
            pair.both("reorder_cache", torch.tensor(digits))
        elif name == "keep":
            pair.both("batch_select_indices", torch.tensor(sorted(set(digits))))
            pair.num_rows = len(set(digits))
        elif name == "mask":
            mask = torch.tensor([row in digits for row in range(pair.num_rows)])
            pair.both("batch_select_indices", mask)
            pair.num_rows = int(mask.sum())
        pair.check()


def test_a_positive_crop_is_the_length_that_is_left() -> None:
    pair = Pair(4)
    pair.update(11)
    pair.layers[0].crop(-6)
    pair.layers[1].crop(5)
    pair.check()
    pair.layers[1].crop(7)
    pair.check()


def test_a_crop_may_come_as_a_tensor() -> None:
    pair = Pair(4, 1)
    pair.update(9)
    pair.layers[0].crop(-3)
    pair.layers[1].crop(torch.tensor(-3))
    pair.update(2)
    pair.check()


def test_a_reset_layer_is_as_new() -> None:
    layer = Pair(4).layers[1]
    layer.update(torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 4))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None and layer.tables.pool.num_used == 0
    keys, _ = layer.update(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8))
    assert keys.shape == layer.keys.shape == (1, 2, 6, 8)


def test_layers_can_be_made_ready_before_the_first_token() -> None:
    cache = PagedCache(LlamaConfig(num_hidden_layers=1))
    layer = cache.layers[0]
    layer.lazy_initialization(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4))
    assert layer.keys.shape == (2, 3, 0, 4) and cache.get_seq_length() == 0
    layer.update(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4), {})
    assert layer.keys.shape == (1, 3, 2, 4)


def test_wider_states_widen_the_cache_as_torch_cat_would() -> None:
    pair = Pair(4)
    pair.update(3, torch.bfloat16)
    pair.update(2)
    pair.update(6, torch.bfloat16)
    pair.check()


def test_what_was_begun_in_inference_mode_goes_on_outside() -> None:
    pair = Pair(4)
    with torch.inference_mode():
        pair.update(3)
        pair.both("offload")
        pair.both("prefetch")
    with torch.no_grad():
        pair.update(1)
        pair.both("reorder_cache", torch.tensor([1, 1]))
        pair.update(1)
    pair.check()


def test_what_was_read_stays_as_it_was() -> None:
    layer = PagedLayer(4)
    state = torch.arange(12.0).view(1, 1, 6, 2)
    layer.update(state, state)
    keys = layer.keys
    layer.crop(-3)
    layer.update(-state, -state)
    assert torch.equal(keys, state)


@torch.enable_grad()
def test_an_only_row_is_read_where_it_lies() -> None:
    layer = PagedLayer(block_size=4)
    states = torch.randn(1, 2, 3, 8)
    layer.update(states, states)
    first, second = (layer.update(states[:, :, :1], states[:, :, :1])[0] for _ in range(2))
    assert first.shape[2] == 4 and second.shape[2] == 5
    layer.update(states, states)  # within what two blocks hold
    third, fourth = (layer.update(states[:, :, :0], states[:, :, :0])[0] for _ in range(2))
    assert third.data_ptr() == fourth.data_ptr(), "nothing was copied"


def test_states_with_gradients_are_refused() -> None:
    state = torch.zeros(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="DynamicCache"):
        PagedLayer(4).update(state, state)


def test_keys_that_were_written_in_place_are_an_error_not_another_answer() -> None:
    cache = PagedCache(LlamaConfig(num_hidden_layers=1))
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    assert cache.layers[0].keys.sum() == 6
    cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    cache.layers[0].values.mul_(2)
    with pytest.raises(RuntimeError, match="written in place"):
        cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)


def test_keys_can_not_be_set_and_the_error_names_the_way_out() -> None:
    with pytest.raises(AttributeError, match="to_dynamic"):
        PagedLayer(4).keys = torch.zeros(1, 1, 2, 4)
    with pytest.raises(AttributeError, match="to_dynamic"):
        PagedLayer(4).values = torch.zeros(1, 1, 2, 4)


def test_another_number_of_rows_is_refused() -> None:
    pair = Pair(4)
    pair.update(3)
    with pytest.raises(ValueError, match="holds 2 rows, the new keys have 1"):
        pair.layers[1].update(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 2))


def test_a_pool_that_grows_keeps_its_blocks_where_they_are() -> None:
    tables = BlockTables(2)
    tables.start(2)
    tables.extend(5)
    before = copy.deepcopy(tables.rows)
    tables.select([1, 0])
    tables.extend(40)
    assert [row[:2] for row in tables.rows] == [before[1][:2], before[0][:2]]
    tables.check()


def test_only_rows_that_share_a_partial_block_copy_it() -> None:
    tables = BlockTables(4)
    tables.start(1)
    tables.extend(6)
    tables.select([0, 0, 0])
    assert tables.pool.num_used == 2 and tables.pool.num_shared == 4
    assert [source for source, _ in tables.extend(1)] == [2, 2]  # the last of the three has it for itself
    assert tables.pool.num_used == 4
    assert tables.extend(1) == []
    tables.select([0, 0])
    assert tables.extend(1) == []  # full blocks stay shared
    tables.check()
