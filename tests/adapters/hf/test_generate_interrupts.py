"""Exceptions that strike callers from outside, at any point: nobody else's call hangs, and nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paged_core import EngineDeadError
from paged_hf.generate import host as hosts
from strikes import LIMIT_S, Struck, strike_until_it_ends, strikes_anywhere
from waiting import until

PROMPT = {"input_ids": torch.tensor([[5, 9, 40, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
GREEDY = {"do_sample": False, "max_new_tokens": 12}
WAYS = {"free": GREEDY, "lockstep": {**GREEDY, "repetition_penalty": 1.3}, "beams": {**GREEDY, "num_beams": 2}}


@pytest.fixture(autouse=True)
def callers_are_struck_anywhere() -> Iterator[None]:
    with strikes_anywhere():
        yield


@pytest.fixture
def lock(model: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Lock:
    """What guards the beginning and the end of the engine's thread; nobody waits for it long."""
    patient = model.generate.tiers.host.thread._lock
    monkeypatch.setattr(patient, "_patience_s", 0.1)
    return patient.bare()


def answers(model: Any, options: dict[str, Any]) -> list[list[int]]:
    """What generate answers within the limit of time."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model.generate(**PROMPT, **options)), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert found, "generate() hangs, or fails"
    return found[0].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_calls_struck_at_any_point_leave_the_model_as_it_was(model: Any, way: str) -> None:
    options, rnd = WAYS[way], random.Random(2)
    expected = model.generate.stock(**PROMPT, **options).tolist()
    host = model.generate.tiers.host
    assert answers(model, options) == expected  # which has built the engine
    began = time.perf_counter()
    assert answers(model, options) == expected
    usual_s = time.perf_counter() - began
    for _ in range(25):
        strike_until_it_ends(lambda: model.generate(**PROMPT, **options), rnd.random() * usual_s)
        assert answers(model, options) == expected
    until(lambda: not host.thread.running)
    assert host.num_open == 0
    assert host.engine.memory.num_blocks_used == 0
    model.generate(**PROMPT, **options)
    assert model.generate.last_report().tier == "native"


def test_a_call_whose_caller_is_gone_is_ended(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_LOOK_S", 0.05)
    host = model.generate.tiers.host

    def caller() -> None:  # is struck where it was about to close its call
        with monkeypatch.context() as patch:
            patch.setattr(type(host), "close", lambda self, call: None)
            model.generate(**PROMPT, **WAYS["lockstep"])

    thread = threading.Thread(target=caller, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    until(lambda: not host.thread.running)
    assert host.num_open == 0
    assert host.engine.memory.num_blocks_used == 0


def test_a_lock_that_is_never_given_back_is_noticed_and_stock_answers(model: Any, lock: threading.Lock) -> None:
    expected = answers(model, GREEDY)
    lock.acquire()
    for _ in range(2):
        assert answers(model, GREEDY) == expected
    model.generate(**PROMPT, **GREEDY)
    assert model.generate.last_report().tier != "native"
    assert "has held the lock of the engine's thread" in str(model.generate.last_report())
    with pytest.raises(EngineDeadError, match="has held the lock"):
        model.generate.release()
    lock.release()
    model.generate(**PROMPT, **GREEDY)
    assert model.generate.last_report().tier == "native"


def test_a_lock_that_gets_stuck_while_a_call_runs_keeps_neither_its_answer_nor_its_thread(
    model: Any, lock: threading.Lock
) -> None:
    expected = answers(model, GREEDY)

    def steal(input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] == 8:
            lock.acquire()
        return scores

    assert answers(model, {**GREEDY, "logits_processor": [steal]}) == expected
    until(lambda: not any(each.name == "paged-generate" for each in threading.enumerate()))
    assert model.generate.tiers.host.num_open == 0
    lock.release()
    assert answers(model, GREEDY) == expected
    model.generate(**PROMPT, **GREEDY)
    assert model.generate.last_report().tier == "native"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, Struck])
@pytest.mark.parametrize("way", WAYS)
def test_what_the_model_raises_reaches_the_calls_it_concerns_and_no_later_one(
    model: Any, way: str, kind: type[BaseException]
) -> None:
    options = WAYS[way]
    expected = answers(model, options)
    mlp, found = model.model.layers[1].mlp, []
    forward = mlp.forward

    def raises(hidden: Any) -> Any:
        raise kind("from the model")

    def call() -> None:
        try:
            model.generate(**PROMPT, **options)
        except BaseException as error:
            found.append(error)

    mlp.forward = raises
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    del mlp.forward
    assert mlp.forward == forward
    assert [(type(error), str(error)) for error in found] == [(kind, "from the model")], "as stock raises it"
    assert answers(model, options) == expected
    model.generate(**PROMPT, **options)
    assert model.generate.last_report().tier == "native"


def test_generate_inside_the_models_own_forward_is_answered_by_stock(model: Any) -> None:
    expected = answers(model, GREEDY)
    mlp = model.model.layers[1].mlp
    forward, inner = mlp.forward, []

    def calls(hidden: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = model.generate(**PROMPT, **GREEDY).tolist()
        return forward(hidden)

    model.generate(**PROMPT, **GREEDY)
    mlp.forward = calls
    assert answers(model, GREEDY) == expected
    assert inner == [expected]
