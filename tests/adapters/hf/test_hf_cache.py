"""PagedCache: stock's own generate() over blocks gives what stock gives."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from paged_core import UnsupportedModel
from paged_hf.cache.block_tables import BlockTables
from paged_hf.cache.paged_cache import PagedCache, PagedLayer
from paged_hf.upstream import CACHE, cache_in_result

_HEADS: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
_GPT = {**_HEADS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8, "hidden_size": None,
        "num_hidden_layers": None, "num_attention_heads": None, "max_position_embeddings": None}  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "bloom": {**_HEADS, "n_layer": 2, "n_head": 4},
    "falcon": {**_HEADS, "alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "gptj": _GPT,
    "gpt_neo": {**_HEADS, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 9, "num_hidden_layers": None, "num_attention_heads": None},
    "codegen": _GPT,
    "mpt": {**_HEADS, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "hidden_size": None,
            "num_hidden_layers": None, "num_attention_heads": None, "max_position_embeddings": None},
    "gemma2": {},
    "deepseek_v3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "head_dim": None},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_experts": 4,
                   "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32},
}  # fmt: skip
_MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
}


def make_ids(num_rows: int, num_tokens: int = 14) -> Tensor:
    return torch.randint(3, 90, (num_rows, num_tokens), generator=torch.Generator().manual_seed(num_rows))


def assert_same(model: Any, ids: Tensor, **options: Any) -> PagedCache:
    """Generate over stock's cache and over ours: the same tokens and scores. Returns ours."""
    outputs, config = [], model.config.get_text_config(decoder=True)
    for cache in (DynamicCache(config=config), PagedCache(config, block_size=4)):
        torch.manual_seed(3)
        settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
        outputs.append(
            model.generate(ids, **{CACHE: cache}, return_dict_in_generate=True, output_scores=True, **settings)
        )
    stock, paged = outputs
    assert paged.sequences.tolist() == stock.sequences.tolist()
    for name in ("scores", "sequences_scores"):
        torch.testing.assert_close(getattr(paged, name, None), getattr(stock, name, None), rtol=1e-5, atol=1e-5)
    assert cache_in_result(paged) is cache
    check(cache)
    return cache


def check(cache: PagedCache) -> None:
    for layer in cache.layers:
        if isinstance(layer, PagedLayer):
            layer.tables.check()


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("family", _FAMILIES)
def test_each_family_generates_what_it_does_over_stocks_cache(tiny: Callable[..., Any], family: str, mode: str) -> None:
    assert_same(tiny(family, **_FAMILIES[family]), make_ids(2), **_MODES[mode])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_beams_end_as_stocks_do(tiny: Callable[..., Any], early_stopping: Any, do_sample: bool) -> None:
    model = tiny("bloom", **_FAMILIES["bloom"])
    greedy = model.generate(make_ids(2), do_sample=False, max_new_tokens=6, pad_token_id=0)
    ends = sorted({*greedy[:, -1].tolist(), *range(40, 60)})  # so that some beams end early
    assert_same(model, make_ids(2), num_beams=3, early_stopping=early_stopping, do_sample=do_sample, eos_token_id=ends)


@pytest.mark.parametrize("family", ["bloom", "gptj", "llama"])
@pytest.mark.parametrize("padding", ["left", "right", "hole"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_padded_rows_are_what_stock_makes_of_them(
    tiny: Callable[..., Any], family: str, padding: str, num_beams: int
) -> None:
    ids = make_ids(3)
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 6), "right": slice(9, 14), "hole": slice(4, 8)}[padding]] = 0
    assert_same(tiny(family, **_FAMILIES[family]), ids, attention_mask=mask, num_beams=num_beams)


@pytest.mark.parametrize("family", ["bloom", "gptj", "llama", "gpt2"])
def test_prompt_lookup_rolls_back_as_over_stocks_cache(tiny: Callable[..., Any], family: str) -> None:
    ids = make_ids(1, 6).repeat(1, 3)  # repeats itself, so that there is something to look up
    cache = assert_same(
        tiny(family, **{"num_hidden_layers": 4, **_FAMILIES[family]}),
        ids,
        prompt_lookup_num_tokens=5,
        max_new_tokens=24,
        eos_token_id=95,
    )
    assert cache.get_seq_length() == 18 + 24 - 1


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_helps_as_over_stocks_cache(tiny: Callable[..., Any], do_sample: bool) -> None:
    model, assistant = tiny("llama"), tiny("llama", seed=1, num_hidden_layers=1)
    assert_same(model, make_ids(1), assistant_model=assistant, do_sample=do_sample, max_new_tokens=20)


def test_autocast_gives_what_it_does_over_stocks_cache(tiny: Callable[..., Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(tiny("llama"), make_ids(3), num_beams=2)


def test_a_conversation_goes_on_over_the_same_cache(tiny: Callable[..., Any]) -> None:
    model = tiny("bloom", **_FAMILIES["bloom"])
    turns = []
    for cache in (DynamicCache(config=model.config), PagedCache(model.config, block_size=4)):
        ids = make_ids(2)
        for _ in range(3):
            ids = model.generate(ids, **{CACHE: cache}, do_sample=False, max_new_tokens=5, pad_token_id=0)
            ids = torch.cat([ids, make_ids(2, 3)], dim=1)
        turns.append(ids.tolist())
    assert turns[0] == turns[1]


def test_a_users_own_decoding_loop_sees_stocks_keys_and_values(tiny: Callable[..., Any]) -> None:
    model, seen = tiny("gpt2"), []

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache = kwargs[CACHE]
        for _ in range(6):
            unseen = input_ids[:, cache.get_seq_length() :]
            logits = model(unseen, **{CACHE: cache}).logits[:, -1]
            seen.append([(keys.clone(), values.clone()) for keys, values, _ in cache])
            input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
            cache.batch_select_indices(torch.tensor([1, 0]))
            input_ids = input_ids[[1, 0]]
        return input_ids

    outputs = [
        model.generate(make_ids(2), **{CACHE: cache}, custom_generate=loop, max_new_tokens=6).tolist()
        for cache in (DynamicCache(config=model.config), PagedCache(model.config, block_size=4))
    ]
    assert outputs[0] == outputs[1]
    torch.testing.assert_close(seen[6:], seen[:6])


def test_beams_share_the_blocks_of_their_past(tiny: Callable[..., Any]) -> None:
    cache = assert_same(tiny("llama"), make_ids(1, 40), num_beams=4, num_return_sequences=4)
    num_layers, prompt_blocks = len(cache.layers), 40 // 4
    assert cache.num_blocks_shared >= num_layers * prompt_blocks * 3
    assert cache.num_blocks_used + cache.num_blocks_shared == num_layers * 4 * -(-(40 + 11) // 4)


def test_a_dropped_cache_is_gone_at_once(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    cache = PagedCache(model.config)
    model.generate(make_ids(2), **{CACHE: cache}, max_new_tokens=3, pad_token_id=0, num_beams=2)
    memory = weakref.ref(cache.layers[0]._blocks[0].data)
    gc.disable()
    try:
        del cache
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2"])
def test_to_dynamic_is_a_stock_cache_of_its_own(tiny: Callable[..., Any], family: str) -> None:
    model = tiny(family, **_FAMILIES[family])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    stock, paged = DynamicCache(config=model.config), PagedCache(model.config)
    ids, _ = (model.generate(make_ids(2), **{CACHE: cache}, **options) for cache in (stock, paged))
    dynamic = paged.to_dynamic()
    assert type(dynamic) is DynamicCache
    assert [type(layer) for layer in dynamic.layers] == [type(layer) for layer in stock.layers]
    ends = [model.generate(ids, **{CACHE: cache}, **options).tolist() for cache in (paged, dynamic, stock)]
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_its_own_way(tiny: Callable[..., Any], twin: Callable[[Any], Any]) -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "num_beams": 2}
    cache = PagedCache(model.config, block_size=4)
    ids = model.generate(make_ids(2), **{CACHE: cache}, **options).repeat_interleave(2, 0)
    options["num_beams"] = 1
    other = twin(cache)
    expected = model.generate(ids, **{CACHE: cache.to_dynamic()}, **options).tolist()
    assert model.generate(ids, **{CACHE: cache}, **options).tolist() == expected
    assert model.generate(ids, **{CACHE: other}, **options).tolist() == expected


def test_a_model_whose_layers_all_have_windows_is_left_to_stock(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModel, match="MistralConfig keeps all its K/V: DynamicSlidingWindowLayer"):
        PagedCache(tiny("mistral").config)


# ---- one layer against stock's ------------------------------------------------------------------------------------


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
