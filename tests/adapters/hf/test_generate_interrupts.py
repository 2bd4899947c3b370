"""Exceptions that strike callers from outside, at any point: nobody else's call hangs, and nothing is left behind."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from paged_hf import paged_generate
from paged_hf.generate import host as hosts
from paged_hf.generate.changes import Changes, StuckError

LIMIT_S = 60
NO_BIRTHS = threading.Lock()  # held where a thread is started, and where a strike is sent
PROMPT = {"input_ids": torch.tensor([[5, 9, 40, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
GREEDY = {"do_sample": False, "max_new_tokens": 12}
WAYS = {"free": GREEDY, "lockstep": {**GREEDY, "repetition_penalty": 1.3}, "beams": {**GREEDY, "num_beams": 2}}


class Struck(BaseException):
    """What another thread sends."""


@pytest.fixture
def model(tiny: Any) -> Any:
    model = tiny("llama", hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=48)
    model.generate = paged_generate(model, check=False)
    return model


@pytest.fixture(autouse=True)
def no_strike_is_sent_while_a_thread_is_born(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython knows a thread under its parent's identity until it runs: a strike that is sent in this moment may hit
    the child instead, which dies of it, and Thread.start() then waits for it for ever."""
    start = threading.Thread.start

    def starts_unstruck(thread: threading.Thread) -> None:
        with NO_BIRTHS:
            start(thread)

    monkeypatch.setattr(threading.Thread, "start", starts_unstruck)


@pytest.fixture(autouse=True)
def threads_switch_everywhere() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def strike_until_it_ends(work: Callable[[], object], delay_s: float) -> None:
    """Run ``work`` in a thread, and send that thread one exception after a while."""

    def run() -> None:
        with suppress(Struck):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(delay_s)
    with NO_BIRTHS:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Struck))
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "a caller hangs"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def answers(model: Any, options: dict[str, Any]) -> list[list[int]]:
    """What generate answers within the limit of time."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model.generate(**PROMPT, **options)), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert found, "generate() hangs, or fails"
    return found[0].tolist()


def test_no_exception_leaves_the_lock_locked() -> None:
    changes, rnd = Changes(), random.Random(0)
    done = threading.Event()

    def enters_and_leaves() -> None:
        while not done.is_set():
            with changes.lock():
                changes.tell()
            changes.wait_for(lambda: True)

    for _ in range(250):
        strike_until_it_ends(enters_and_leaves, rnd.random() * 0.003)
        assert not changes._lock.locked()


def test_who_waits_hears_of_changes_though_others_were_struck_as_they_told_them() -> None:
    changes, rnd = Changes(), random.Random(1)
    count, heard = [0], []

    def hears() -> None:
        for number in range(1, 101):
            assert changes.wait_for(lambda number=number: count[0] >= number, LIMIT_S)
            heard.append(number)

    def tells() -> None:
        while True:
            with changes.lock():
                count[0] += 1
                changes.tell()
            time.sleep(0)

    listener = threading.Thread(target=hears, daemon=True)
    listener.start()
    while listener.is_alive():
        strike_until_it_ends(tells, rnd.random() * 0.003)
    assert heard == list(range(1, 101))


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
    until(lambda: host._thread is None)
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
    until(lambda: host._thread is None)
    assert host.num_open == 0
    assert host.engine.memory.num_blocks_used == 0


def test_a_lock_that_is_never_given_back_is_noticed_and_stock_answers(model: Any) -> None:
    host = model.generate.tiers.host
    expected = answers(model, GREEDY)
    host._changes = Changes(patience_s=0.1)
    thread = threading.Thread(target=host._changes._lock.acquire)
    thread.start()
    thread.join()
    for _ in range(2):
        assert answers(model, GREEDY) == expected
    model.generate(**PROMPT, **GREEDY)
    assert model.generate.last_report().tier != "native"
    assert "has held the lock of the model's engine" in str(model.generate.last_report())
    with pytest.raises(StuckError):
        model.generate.release()
    host._changes._lock.release()
    model.generate(**PROMPT, **GREEDY)
    assert model.generate.last_report().tier == "native"


def test_a_lock_that_gets_stuck_while_calls_run_ends_them_with_that_message(model: Any) -> None:
    host, found = model.generate.tiers.host, []
    host._changes = Changes(patience_s=0.1)

    def steal(input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] == 8:
            host._changes._lock.acquire()
        return scores

    def call() -> None:
        try:
            model.generate(**PROMPT, **GREEDY, logits_processor=[steal])
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert "has held the lock" in str(found[0])
    until(lambda: not any(each.name == "paged-generate" for each in threading.enumerate()))
    host._changes._lock.release()
    assert answers(model, GREEDY) == model.generate.stock(**PROMPT, **GREEDY).tolist()


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
