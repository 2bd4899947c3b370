"""What one request, or a plugin, does inside a step harms nobody else: whatever it raises, answers or calls."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from bad_request import PROMPT, MyOwn, assert_only_bad_failed, make_engine, run
from case_ids import told
from paged_core import (
    Engine,
    FinishReason,
    ReentryError,
    Selection,
    hookimpl,
)
from tiny_engine import greedy
from tiny_model import TinyModel

BASE_EXCEPTIONS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MyOwn]
of_every_kind = pytest.mark.parametrize("kind", BASE_EXCEPTIONS)


def raises(kind: type[BaseException], at_call: int = 3) -> Any:
    calls = []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) >= at_call:
            raise kind
        return args[-1]

    return raising


# ---- exceptions of every kind ------------------------------------------------------------------------------------


@of_every_kind
def test_what_a_processor_raises_ends_its_own_request(kind: type[BaseException]) -> None:
    engine = make_engine()
    engine.add_request("bad", PROMPT, greedy(9, logits_processors=[raises(kind)]))
    assert_only_bad_failed(engine, kind.__name__)


@of_every_kind
def test_what_a_selector_raises_ends_its_own_group(kind: type[BaseException]) -> None:
    engine = make_engine()
    engine.add_group("bad", [PROMPT, [1]], greedy(9), selector=SimpleNamespace(select=raises(kind, 1)))
    assert_only_bad_failed(engine, kind.__name__)


@of_every_kind
def test_what_the_model_raises_on_a_request_ends_that_request(kind: type[BaseException]) -> None:
    class Fussy(TinyModel):
        def forward(self, token_ids: Any, *rest: Any) -> Any:
            if 95 in token_ids.tolist():
                raise kind
            return super().forward(token_ids, *rest)

    engine = make_engine(Fussy())
    engine.add_request("bad", [95, 1], greedy(9))
    assert_only_bad_failed(engine, kind.__name__)


@of_every_kind
def test_what_a_plugin_raises_about_a_request_is_told_to_who_adds_it(kind: type[BaseException]) -> None:
    due = [kind]

    def create_logits_processor() -> Any:
        if due:
            raise due.pop()

    engine = make_engine(plugins=[SimpleNamespace(create_logits_processor=hookimpl(create_logits_processor))])
    with pytest.raises(kind):
        engine.add_request("bad", PROMPT, greedy(9))
    engine.add_request("bad", PROMPT, greedy(9, logits_processors=[raises(ValueError)]))
    assert_only_bad_failed(engine)


@of_every_kind
def test_what_an_observer_raises_keeps_no_other_from_hearing(kind: type[BaseException], caplog: Any) -> None:
    heard = []

    def on(name: str) -> Any:
        return hookimpl(lambda: heard.append(name))

    hooks = ("on_request_added", "on_step_finished", "on_request_finished")
    raising = SimpleNamespace(**{name: hookimpl(specname=name)(raises(kind, 1)) for name in hooks})
    hearing = SimpleNamespace(**{name: on(name) for name in hooks})
    engine = make_engine(plugins=[hearing, raising, SimpleNamespace(**{name: on(name) for name in hooks})])
    engine.add_request("a", [1, 2, 3], greedy(1))
    assert run(engine)["a"].request.output_token_ids == TinyModel().generate([1, 2, 3], 1)
    assert heard == [name for name in hooks for _ in range(2)]
    assert kind.__name__ in caplog.text


@pytest.mark.parametrize("place", ["processor", "selector", "model", "observer"])
def test_a_real_interrupt_comes_through_and_the_engine_goes_on_where_it_was(place: str) -> None:
    interrupts = [3]

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        interrupts[0] -= 1
        if interrupts[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return args[-1] if args else None

    class Interrupted(TinyModel):
        def forward(self, *args: Any) -> Any:
            if place == "model":
                interrupt()
            return super().forward(*args)

    class Selector:
        def select(self, logits: Any, requests: Any) -> Selection:
            interrupt()
            return Selection(logits.argmax(-1).tolist())

    watching = [SimpleNamespace(on_step_finished=hookimpl(lambda: interrupt()))] if place == "observer" else []
    engine = make_engine(Interrupted(), watching)
    processors = [interrupt] if place == "processor" else []
    selector = Selector() if place == "selector" else None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        engine.add_request("a", PROMPT, greedy(9, logits_processors=processors), selector=selector)
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        assert run(engine)["a"].request.output_token_ids == TinyModel().generate(PROMPT, 9)
    finally:
        signal.signal(signal.SIGINT, before)


# ---- a policy ----------------------------------------------------------------------------------------------------


class ByAnything:
    def __init__(self, keys: dict[str, Any]) -> None:
        self.keys = keys

    def key(self, request: Any) -> Any:
        key = self.keys.get(request.id, 0)
        if isinstance(key, BaseException):
            raise key
        return key


class Incomparable:
    def __lt__(self, other: object) -> bool:
        raise MyOwn("I compare to nobody")


@pytest.mark.parametrize(
    "key", [ValueError("no key for you"), MyOwn(), None, "text", (1, 2), float("nan"), Incomparable()], ids=told
)
def test_a_policy_without_a_usable_key_for_a_request_refuses_that_one(key: Any) -> None:
    policy = ByAnything({"bad": key})
    plugin = SimpleNamespace(create_scheduling_policy=hookimpl(lambda name: policy if name == "any" else None))
    engine = make_engine(plugins=[plugin], scheduling_policy="any", max_num_seqs=2)
    for i in range(3):
        engine.add_request(str(i), [1, 2, 3], greedy(9))
    with pytest.raises((ValueError, MyOwn, TypeError)):
        engine.add_request("bad", PROMPT, greedy(9))
    engine.check()
    assert engine.num_open == 3
    ends = run(engine)
    assert [ends[str(i)].request.output_token_ids for i in range(3)] == [TinyModel().generate([1, 2, 3], 9)] * 3


def test_a_policy_is_asked_once_for_each_request_so_it_cant_change_its_mind() -> None:
    class Moody:
        num_calls = 0

        def key(self, request: Any) -> int:
            self.num_calls += 1
            if self.num_calls > 6:
                raise ValueError("enough")
            return -self.num_calls

    policy = Moody()
    plugin = SimpleNamespace(create_scheduling_policy=hookimpl(lambda name: policy if name == "any" else None))
    engine = make_engine(plugins=[plugin], scheduling_policy="any", num_blocks=14, watermark=0)
    for i in range(6):
        engine.add_request(str(i), [i] * 9, greedy(12))
    ends = run(engine)
    assert engine.last_stats.total_preemptions > 0
    assert [ends[str(i)].request.output_token_ids for i in range(6)] == [
        TinyModel().generate([i] * 9, 12) for i in range(6)
    ]


# ---- calls from inside a step ------------------------------------------------------------------------------------

CALLS: dict[str, Any] = {
    "step": lambda engine: engine.step(),
    "add_request": lambda engine: engine.add_request("new", PROMPT, greedy(1)),
    "abort": lambda engine: engine.abort("neighbour"),
    "stop": lambda engine: engine.stop(engine._open.rows("neighbour")[0]),
    "close": lambda engine: engine.close(),
    "release_memory": lambda engine: engine.release_memory(),
    "preempt_held": lambda engine: engine.preempt_held(),
}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_processor_cant_call_the_engine_that_calls_it(call: str) -> None:
    engine = make_engine()

    def calling(input_ids: Any, scores: Any) -> Any:
        with pytest.raises(ReentryError, match="during a step of the same engine"):
            CALLS[call](engine)
        CALLS[call](engine)

    engine.add_request("bad", PROMPT, greedy(9, logits_processors=[calling]))
    assert_only_bad_failed(engine, "ReentryError", "between two steps")


def test_an_observer_may_cancel_and_add_requests() -> None:
    engine: Engine

    def on_request_finished(output: Any) -> None:
        if output.request.id == "first":
            engine.abort("second")
            engine.add_request("third", [1, 2, 3], greedy(2))

    engine = make_engine(plugins=[SimpleNamespace(on_request_finished=hookimpl(on_request_finished))])
    engine.add_request("first", PROMPT, greedy(2))
    engine.add_request("second", [4], greedy(90))
    ends = run(engine)
    assert ends["second"].finish_reason is FinishReason.ABORT
    assert ends["third"].request.output_token_ids == TinyModel().generate([1, 2, 3], 2)
