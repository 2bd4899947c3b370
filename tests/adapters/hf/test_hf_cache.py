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
from torch import Tensor
from transformers import DynamicCache

from paged_core import UnsupportedModel
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
