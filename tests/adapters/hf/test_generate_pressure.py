"""paged_generate where memory is short, callers are slow, and models change while others call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from paged_hf import paged_generate
from paged_hf.upstream import cache_in_result

BLOCK_BYTES = 2 * 2 * 2 * 8 * 8 * 4  # 2 layers, K and V, 2 kv heads of 8, 8 tokens, float32
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model(tiny: Any) -> Iterator[Any]:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    made.generate = paged_generate(made, kv_cache_memory=12 * BLOCK_BYTES, check=False)
    yield made
    assert made.generate.tiers.host.engine.memory.num_blocks_used == 0


def ids(length: int) -> torch.Tensor:
    return torch.randint(1, 90, (1, length), generator=torch.Generator().manual_seed(length))


class Waits:
    """A processor that stops in the middle of a call until it is told to go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self.go_on.wait(60)
        return scores


def test_a_processor_that_calls_generate_itself_gets_the_blocks_of_its_own_call(model: Any) -> None:
    inner: list[torch.Tensor] = []

    def asks(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not inner:
            inner.append(model.generate(ids(60), max_new_tokens=8, **GREEDY))
        return scores

    got = model.generate(ids(61), max_new_tokens=8, logits_processor=LogitsProcessorList([asks]), **GREEDY)
    assert torch.equal(got, model.generate.stock(ids(61), max_new_tokens=8, **GREEDY))
    assert torch.equal(inner[0], model.generate.stock(ids(60), max_new_tokens=8, **GREEDY))


def test_a_caller_that_takes_its_time_does_not_keep_the_cache_from_others(model: Any) -> None:
    waits, slow = Waits(), []
    options = {"max_new_tokens": 8, "logits_processor": LogitsProcessorList([waits]), **GREEDY}
    caller = threading.Thread(target=lambda: slow.append(model.generate(ids(61), **options)))
    caller.start()
    assert waits.reached.wait(60)
    got = model.generate(ids(60), max_new_tokens=8, **GREEDY)
    assert model.generate.last_report().tier == "native"
    waits.go_on.set()
    caller.join()
    assert torch.equal(got, model.generate.stock(ids(60), max_new_tokens=8, **GREEDY))
    assert torch.equal(slow[0], model.generate.stock(ids(61), max_new_tokens=8, **GREEDY))


def test_weights_changed_while_another_call_is_open_count_for_the_next_one(model: Any) -> None:
    waits = Waits()
    options = {"max_new_tokens": 4, "logits_processor": LogitsProcessorList([waits]), **GREEDY}
    before = model.generate(ids(24), max_new_tokens=8, **GREEDY)  # its blocks are kept
    caller = threading.Thread(target=lambda: model.generate(ids(9), **options))
    caller.start()
    assert waits.reached.wait(60)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) * weight.std())
    got = model.generate(ids(24), max_new_tokens=8, **GREEDY)
    waits.go_on.set()
    caller.join()
    assert torch.equal(got, model.generate.stock(ids(24), max_new_tokens=8, **GREEDY))
    assert not torch.equal(got, before)
    again = model.generate(ids(24), max_new_tokens=8, **GREEDY)
    assert torch.equal(again, got), "nothing computed with the old weights is found again"


def test_a_cache_that_comes_back_is_whole_though_its_rows_were_preempted(model: Any) -> None:
    host = model.generate.tiers.host
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, **GREEDY}
    want = cache_in_result(model.generate.stock(ids(40), **options))

    def preempt(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended = torch.tensor([input_ids.shape[1] >= 44])
        if ended:  # what others would do to a row that is held: see ScheduleBuilder._victim
            done = threading.Event()
            call = next(iter(host.thread.holders))

            def take(engine: Any) -> None:
                scheduler = engine._scheduler
                scheduler._departures.preempt(scheduler.running[-1])
                done.set()

            host.post(call, take)
            assert done.wait(60)
        return ended

    got = cache_in_result(model.generate(ids(40), stopping_criteria=StoppingCriteriaList([preempt]), **options))
    assert got.get_seq_length() == want.get_seq_length() == 43
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("limits", [(20, 12), (12, 20)])
def test_of_several_lengths_the_shortest_ends_a_call(model: Any, limits: tuple[int, int]) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(limit) for limit in limits])
    options = {"max_new_tokens": 30, "stopping_criteria": criteria, **GREEDY}
    got = model.generate(ids(5), **options)
    assert model.generate.last_report().loop == "free"
    assert torch.equal(got, model.generate.stock(ids(5), **options))


def test_a_plugin_that_changes_logits_has_no_say_in_generate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from paged_core import hookimpl

    class Contrary:
        @hookimpl
        def create_logits_processor(self, request: Any) -> Any:
            return lambda input_ids, scores: -scores

    host = model.generate.tiers.host
    from paged_core import Engine
    from paged_hf.model.paged_model import HFPagedModel

    def build() -> Any:
        host.paged_model = HFPagedModel(model)
        return Engine(host.paged_model, host.config, plugins=[Contrary()])

    monkeypatch.setattr(host, "_build", build)
    got = model.generate(ids(6), max_new_tokens=6, **GREEDY)
    assert model.generate.last_report().tier == "native"
    assert torch.equal(got, model.generate.stock(ids(6), max_new_tokens=6, **GREEDY))
