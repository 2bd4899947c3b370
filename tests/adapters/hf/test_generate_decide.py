"""Which tier a prepared call is meant for: each rule by a call that only it has something against. No engine runs."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from paged_hf import upstream
from paged_hf.generate import decide, obstacles, raw_call
from paged_hf.generate.decide import Native, OverBlocks, Stock
from paged_hf.generate.prepared import Prepared
from paged_hf.generate.raw_call import RawCall
from prepared_calls import (
    IDS,
    Change,
    configured,
    full_cache,
    masked,
    named,
    of_a_class_of_its_own,
    of_model,
    over,
    padded_with,
    passing,
    prepared,
)

DOCS = Path(__file__).parents[3] / "docs/generate.md"


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny("llama", num_hidden_layers=1, hidden_size=32)


@pytest.fixture
def greedy(model: Any) -> Prepared:
    return prepared(model, do_sample=False)


WITH_DROPOUT = of_model(lambda model: model.train().add_module("noise", nn.Dropout(0.1)))
HOOKED = of_model(lambda model: model.lm_head.register_forward_hook(lambda *args: None))
COMPILED = of_model(lambda model: setattr(model.lm_head, "_compiled_call_impl", lambda *args: None))

ALONE: dict[Any, tuple[Change, str]] = {  # rule: what makes a plain greedy call one that it looks for; its reason
    obstacles.model_has_an_encoder: (
        of_model(lambda model: setattr(model.config, "is_encoder_decoder", True)),
        "it is an encoder-decoder model",
    ),
    obstacles.processes_keep_step: (
        passing(synced_gpus=True),
        "synced_gpus: every process must call the model in step with the others",
    ),
    obstacles.wants_what_forwards_see: (
        configured(output_attentions=True, return_dict_in_generate=True),
        "output_attentions is asked for",
    ),
    obstacles.wants_another_kind_of_cache: (
        configured(cache_implementation="quantized"),
        "cache_implementation='quantized' is asked for, which gives other answers",
    ),
    obstacles.wants_to_be_compiled: (
        configured(compile_config=object()),
        "compile_config is set, and stock compiles the model",
    ),
    obstacles.assists_another_model: (configured(is_assistant=True), "the model is another one's assistant"),
    obstacles.brings_media: (passing(pixel_values=torch.ones(1)), "it is multimodal: pixel_values"),
    obstacles.positions_are_for_other_rows: (
        passing(position_ids=torch.arange(3).expand(5, 3)),
        "position_ids have 5 rows, the prompts 2",
    ),
    obstacles.cache_is_the_callers: (over(full_cache), "a cache of the caller's own was passed"),
    obstacles.trains_with_noise: (
        WITH_DROPOUT,
        "the model is in training mode and has dropout (0.1): call model.eval() before generate()",
    ),
    obstacles.loop_is_unknown: (named("_assisted_decoding"), "the engine has no such decoding loop: assisted_decoding"),
    obstacles.passes_more_to_the_model: (
        passing(token_type_ids=IDS, head_mask=None, tokenizer=object(), extra={}),
        "token_type_ids is passed to the model",
    ),
    obstacles.searches_beams_without_a_cache: (
        named(upstream.BEAM_SEARCH, use_cache=False),
        "beam search without a cache tells nobody which beams go on",
    ),
    obstacles.prefills_in_chunks: (configured(prefill_chunk_size=2), "prefill_chunk_size is set"),
    obstacles.prompts_are_no_rows_of_ids: (
        lambda call: replace(call, input_ids=IDS.to(torch.int16)),
        "the prompts are torch.int16 [2, 3]",
    ),
    obstacles.mask_has_another_shape: (
        masked([1, 1, 1]),
        "the attention mask is [1, 3], not [2, 3] as the prompts",
    ),
    obstacles.mask_has_other_values: (masked([2, 1, 1], [1, 1, 1]), "the attention mask has other values than 0 and 1"),
    obstacles.padding_is_not_on_the_left: (
        masked([1, 1, 0], [1, 1, 1]),
        "the attention mask has holes, or padding on the right",
    ),
    obstacles.padding_is_no_token: (padded_with(-100), "the padding holds a token that isn't among the model's 96"),
    obstacles.positions_have_another_shape: (passing(position_ids=torch.arange(5)[None]), "position_ids are [1, 5]"),
    obstacles.positions_are_unusual: (
        passing(position_ids=torch.tensor([[0, 1, 2], [1, 2, 3]])),
        "position_ids aren't those that the attention mask gives",
    ),
    obstacles.class_prepares_inputs_otherwise: (
        of_model(of_a_class_of_its_own),
        "its class has a prepare_inputs_for_generation of its own",
    ),
    obstacles.someone_sees_batches: (HOOKED, "there is a forward hook on lm_head"),
}
UNDER_CIRCUMSTANCES = {obstacles.computes_under_autocast}  # which isn't a property of the call


@pytest.mark.parametrize("rule", ALONE, ids=lambda rule: rule.__name__)
def test_each_rule_has_its_call_and_its_reason(rule: Any, greedy: Prepared) -> None:
    change, reason = ALONE[rule]
    expected = Stock(reason) if rule in decide.TO_STOCK else OverBlocks(reason)
    assert decide.decide(greedy, {}) == Native(free=True, drops_ended=False)
    assert decide.decide(change(greedy), {}) == expected


def test_autocast_is_not_for_the_engine(greedy: Prepared) -> None:
    with torch.autocast("cpu"):
        assert decide.decide(greedy, {}) == OverBlocks("autocast is on")


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (over(lambda config: StaticCache(config, max_cache_len=9)), "stock doesn't use its usual cache"),
        (COMPILED, "lm_head is compiled, which works with stock's own caches only"),
    ],
    ids=["static", "compiled"],
)
def test_what_neither_tier_can_do_is_for_stock_with_both_reasons(
    change: Change, obstacle: str, greedy: Prepared
) -> None:
    found = decide.decide(change(greedy), {"native": "the engine won't"})
    assert found == Stock(f"the engine won't; {obstacle}")


def test_every_rule_is_looked_at_here() -> None:
    assert {*decide.TO_STOCK, *decide.NOT_NATIVE} == {*ALONE, *UNDER_CIRCUMSTANCES}


def test_what_is_known_of_a_tier_goes_before_what_is_asked_of_the_call(greedy: Prepared) -> None:
    hooked = HOOKED(greedy)
    assert decide.decide(hooked, {"native": "self-check: wrong"}) == OverBlocks("self-check: wrong")
    assert decide.decide(greedy, {"native": "one", "cache": "another"}) == Stock("one; another")
    assert decide.decide(greedy, {"cache": "another"}) == Native(free=True, drops_ended=False)


def test_padding_on_the_left_and_its_positions_are_native(greedy: Prepared) -> None:
    padded = masked([0, 1, 1], [1, 1, 1])(greedy)
    placed = passing(position_ids=torch.tensor([[1, 0, 1], [0, 1, 2]]))(padded)
    assert decide.decide(placed, {}) == Native(free=True, drops_ended=False)


def test_a_hole_in_the_mask_is_no_padding_and_padded_rows_have_positions_of_their_own(greedy: Prepared) -> None:
    holes = masked([1, 0, 1], [1, 1, 1])(greedy)
    assert decide.decide(holes, {}) == OverBlocks("the attention mask has holes, or padding on the right")
    padded = masked([0, 1, 1], [1, 1, 1])(greedy)
    unplaced = passing(position_ids=torch.tensor([[0, 1, 2], [0, 1, 2]]))(padded)
    assert decide.decide(unplaced, {}) == OverBlocks("position_ids aren't those that the attention mask gives")


def test_who_sees_more_than_tokens_advances_with_the_loop(model: Any) -> None:
    lockstep = Native(free=False, drops_ended=False)
    for options in (
        {"do_sample": True},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"repetition_penalty": 1.2},
        {"max_time": 1e9},
        {"stopping_criteria": [lambda ids, scores, **kwargs: torch.zeros(len(ids), dtype=torch.bool)]},
    ):
        assert decide.decide(prepared(model, **{"do_sample": False, **options}), {}) == lockstep, options
    greedy = prepared(model, do_sample=False)
    assert decide.decide(passing(streamer=object())(greedy), {}) == lockstep
    assert decide.decide(passing(inputs_embeds=torch.zeros(2, 3, 32))(greedy), {}) == lockstep


def test_rows_that_end_are_dropped_where_nobody_can_tell(model: Any) -> None:
    def drops(**options: Any) -> bool:
        decision = decide.decide(prepared(model, do_sample=True, eos_token_id=3, **options), {})
        assert isinstance(decision, Native)
        return decision.drops_ended

    def seen(ids: Tensor, scores: Tensor) -> Tensor:
        return scores

    assert drops() and drops(repetition_penalty=1.2)
    assert not drops(return_dict_in_generate=True)
    assert not drops(logits_processor=[seen])


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), {}, "the arguments don't fit"),
        (
            (),
            {"custom_generate": "owner/repository"},
            "custom_generate names a repository, which replaces generate() altogether",
        ),
        (
            (),
            {"cache_implementation": "paged"},
            "cache_implementation='paged' asks for stock's own continuous batching",
        ),
        ((), {upstream.CACHE: DynamicCache()}, "a cache of the caller's own was passed"),
        ((), {"max_new_tokens": 3}, None),
    ],
    ids=["unfit", "repository", "paged", "cache", "plain"],
)
def test_what_stock_must_not_see_us_in_never_reaches_it(
    args: tuple[Any, ...], kwargs: dict[str, Any], reason: str | None, model: Any
) -> None:
    found = decide.decide_as_asked(RawCall(model, args, kwargs, as_stock=False))
    assert (found.reason if found else None) == reason


def test_a_part_that_is_called_by_itself_is_told_before_all_else(model: Any) -> None:
    call = RawCall(model, (), {"cache_implementation": "paged"}, as_stock=True, by_wrapper=False)
    assert decide.decide_as_asked(call) == Stock("not this model is patched, but the one around it")
    assert decide.decide_as_asked(replace(call, by_wrapper=True)) == Stock("as_stock() is in force")
    wrapper = RawCall(SimpleNamespace(), (), {"adapter_names": ["a"]}, as_stock=False)
    assert decide.decide_as_asked(wrapper, decide.TO_STOCK_AROUND_PEFT) == Stock(
        "adapter_names are one a row of stock's batch"
    )


def test_the_docs_list_every_rule_in_the_order_in_which_they_are_asked() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("### Which calls take which tier\n")[2].partition("\n###")[0]
    listed = re.findall(r"^- (.+)$", section, re.MULTILINE)
    tables = (
        decide.TO_STOCK_AS_ASKED,
        decide.TO_STOCK_AROUND_PEFT,
        decide.TO_STOCK,
        decide.NOT_NATIVE,
        decide.NOT_OVER_BLOCKS,
    )
    rules: list[Any] = [rule for table in tables for rule in table]
    assert listed == [(inspect.getdoc(rule) or "").partition("\n")[0] for rule in rules]
    written = [
        rule
        for module in (raw_call, obstacles)
        for name, rule in inspect.getmembers(module, inspect.isfunction)
        if rule.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert set(written) == set(rules), "a rule that no table has"
