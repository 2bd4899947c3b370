"""What one request, or a plugin, does inside a step harms nobody else: whatever it raises, answers or calls."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from case_ids import told
from paged_core import (
    Engine,
    FinishReason,
    InvalidRequestError,
    ReentryError,
    SamplingParams,
    Selection,
    hookimpl,
)
from paged_core.sampling.sampler import Sampler
from tiny_engine import greedy, tiny_engine
from tiny_model import VOCAB, TinyModel

make_engine = partial(tiny_engine, num_blocks=200, max_num_batched_tokens=None)

PROMPT = [8, 6, 7, 5, 3, 0, 9]


class MyOwn(BaseException):
    pass


BASE_EXCEPTIONS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MyOwn]
of_every_kind = pytest.mark.parametrize("kind", BASE_EXCEPTIONS)


def run(engine: Engine) -> dict[str, Any]:
    """The final output of each request's first row, by id."""
    ends: dict[str, Any] = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                ends.setdefault(output.request.id, output)
        engine.check()
    assert engine.memory.num_blocks_used == 0
    return ends


def assert_only_bad_failed(engine: Engine, *words: str) -> None:
    """The request "bad" ends with an error that holds ``words``; a neighbour, and who comes later, get what each gets
    alone."""
    engine.add_request("neighbour", [1, 2, 3], greedy(9))
    ends = run(engine)
    assert ends["bad"].finish_reason is FinishReason.ERROR
    for word in words:
        assert word in ends["bad"].error
    engine.add_request("later", [1, 2, 3], greedy(9))
    for end in (ends["neighbour"], run(engine)["later"]):
        assert end.request.output_token_ids == TinyModel().generate([1, 2, 3], 9)


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


# ---- a step of selection is all or nothing -----------------------------------------------------------------------


class NarrowSampler(Sampler):
    """Has no memory for more than one row, once it has gone through all of them."""

    def _tokens(self, scores: Any, requests: Any, *rest: Any) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("no room for so many rows")
        return super()._tokens(scores, requests, *rest)


NARROW = SimpleNamespace(create_sampler=hookimpl(lambda spec: NarrowSampler()))


def test_a_sampler_without_memory_makes_no_search_count_its_step_twice() -> None:
    found = []
    for plugins in ((), (NARROW,)):
        engine = make_engine(plugins=plugins)
        beams = SamplingParams(n=3, max_tokens=8, use_beam_search=True)
        (first, *_) = engine.add_request("beams", PROMPT, beams)
        for i in range(3):
            engine.add_request(str(i), [i, 1], greedy(12))
        ends = run(engine)
        assert [ends[str(i)].request.output_token_ids for i in range(3)] == [
            TinyModel().generate([i, 1], 12) for i in range(3)
        ]
        found.append([(beam.token_ids, round(beam.score, 5)) for beam in first.selector.best])
    assert found[0] == found[1]


def test_nor_is_any_other_selector_or_processor_asked_twice_for_a_step() -> None:
    class Counting:
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def select(self, logits: Any, requests: Any) -> Selection:
            self.lengths.append(len(requests[0].tokens))
            return Selection(logits.argmax(-1).tolist())

    seen: list[int] = []

    def processor(input_ids: Any, scores: Any) -> Any:
        seen.append(input_ids.shape[1])
        return scores

    engine, own = make_engine(plugins=[NARROW]), Counting()
    engine.add_group("own", [PROMPT, PROMPT], greedy(6), selector=own)
    engine.add_request("plain", PROMPT, greedy(6))
    engine.add_request("edited", PROMPT, greedy(6, logits_processors=[processor]))
    ends = run(engine)
    assert own.lengths == seen == list(range(len(PROMPT), len(PROMPT) + 6))
    assert {tuple(end.request.output_token_ids) for end in ends.values()} == {tuple(TinyModel().generate(PROMPT, 6))}


def test_a_row_that_memory_has_no_room_for_ends_alone() -> None:
    class Tiny(NarrowSampler):
        def _tokens(self, scores: Any, requests: Any, *rest: Any) -> Any:
            if requests[0].id == "bad" and requests[0].num_output == 2:
                raise torch.OutOfMemoryError("not for this one")
            return super()._tokens(scores, requests, *rest)

    engine = make_engine(plugins=[SimpleNamespace(create_sampler=hookimpl(lambda spec: Tiny()))])
    engine.add_request("bad", PROMPT, greedy(9))
    assert_only_bad_failed(engine, "not for this one")


# ---- what is answered is looked at -------------------------------------------------------------------------------

MALFORMED = {
    "negative": (lambda n: Selection([-5] * n), "-5 was chosen; token ids go from 0 to 96"),
    "beyond": (lambda n: Selection([VOCAB] * n), "97 was chosen"),
    "no int": (lambda n: Selection([1.5] * n), "1.5 was chosen"),
    "short": (lambda n: Selection([1] * (n - 1)), "token_ids must have one entry a row, 2, and not 1 entries"),
    "long": (lambda n: Selection([1] * (n + 1)), "not 3 entries"),
    "no list": (lambda n: Selection(7), "not 7"),
    "none": (lambda n: None, "must answer a Selection, and not a NoneType"),
    "tensor": (lambda n: torch.zeros(n), "not a Tensor"),
    "logprobs": (lambda n: Selection([1] * n, logprobs=[{}]), "logprobs must have one entry a row"),
    "a logprob": (lambda n: Selection([1] * n, logprobs=[3.0] * n), "must be a dict"),
    "errors": (lambda n: Selection([1] * n, errors={7: "what"}), "errors speak of row 7; there are rows 0 to 1"),
    "verdict": (lambda n: Selection([1] * n, finished={0: "enough"}), "must be a FinishReason, and not 'enough'"),
    "verdicts": (lambda n: Selection([1] * n, finished={-1: FinishReason.STOP}), "finished speak of row -1"),
    "parents": (lambda n: Selection([1] * n, parents=[0]), "parents must have one entry a row"),
    "a parent": (lambda n: Selection([1] * n, parents=[0, 9]), "row 1 can't go on from row 9"),
    "half held": (lambda n: Selection([1] + [None] * (n - 1)), "gets all of its tokens at once, or none"),
}


@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_a_selector_that_answers_what_cant_be_ends_its_own_group(case: str) -> None:
    answer, told = MALFORMED[case]
    engine = make_engine()
    selector = SimpleNamespace(select=lambda logits, requests: answer(len(requests)))
    engine.add_group("bad", [PROMPT, [1]], greedy(9), selector=selector)
    assert_only_bad_failed(engine, "choosing the next token failed", told)


def test_integers_of_any_kind_are_token_ids() -> None:
    engine = make_engine()
    selector = SimpleNamespace(select=lambda logits, requests: Selection(logits.argmax(-1).numpy()))
    engine.add_request("a", PROMPT, greedy(9), selector=selector)
    row = run(engine)["a"].request
    assert row.output_token_ids == TinyModel().generate(PROMPT, 9)
    assert {type(token) for token in row.tokens} == {int}


def test_a_selector_of_two_groups_cant_mix_them() -> None:
    class Mixing:
        def select(self, logits: Any, requests: Any) -> Selection:
            return Selection(logits.argmax(-1).tolist(), parents=list(reversed(range(len(requests)))))

    engine, mixing = make_engine(), Mixing()
    engine.add_group("bad", [PROMPT], greedy(4), selector=mixing)
    engine.add_group("other", [[5, 6]], greedy(4), selector=mixing)
    assert_only_bad_failed(engine, "row 0 can't go on from row 1")


@pytest.mark.parametrize("way", ["raises", "too few"])
def test_a_sampler_that_cant_tell_a_prompts_logprobs_ends_that_request(way: str) -> None:
    class Mute(Sampler):
        def prompt_logprobs(self, logits: Any, next_ids: Any, num: int) -> Any:
            if way == "raises":
                raise MyOwn("no words")
            return super().prompt_logprobs(logits, next_ids, num)[1:]

    engine = make_engine(plugins=[SimpleNamespace(create_sampler=hookimpl(lambda spec: Mute()))])
    engine.add_request("bad", PROMPT, greedy(9, prompt_logprobs=1))
    assert_only_bad_failed(engine, "the logprobs of its prompt could not be told")


def test_a_sampler_that_leaves_a_token_for_later_ends_the_row_instead_of_holding_it_for_ever() -> None:
    class Later(Sampler):
        def select(self, logits: Any, requests: Any) -> Selection:
            answer = super().select(logits, requests)
            return answer._replace(
                token_ids=[
                    None if request.id == "bad" else token
                    for request, token in zip(requests, answer.token_ids, strict=True)
                ]
            )

    engine = make_engine(plugins=[SimpleNamespace(create_sampler=hookimpl(lambda spec: Later()))])
    engine.add_request("bad", PROMPT, greedy(9))
    assert_only_bad_failed(engine, "the engine's sampler chose no token")


def test_tokens_and_parents_that_cant_be_resumed_are_refused_and_change_nothing() -> None:
    engine = make_engine()
    hold = SimpleNamespace(select=lambda logits, requests: Selection([None] * len(requests)))
    rows = engine.add_group("held", [PROMPT, PROMPT], greedy(9), selector=hold)
    other = engine.add_group("other", [[1, 2]], greedy(9), selector=hold)
    engine.step()
    for given, tokens, parents in (
        (rows, [1, 2], [0]),
        (rows, [1, 2], [0, -1]),
        (rows, [1, 2], [0, 2]),
        (rows, [1, 2.0], None),
        ([*rows, *other], [1, 2, 3], [0, 2, 2]),
        ([rows[0], rows[0]], [1, 2], None),
        ([rows[0]], [1], None),
    ):
        with pytest.raises(InvalidRequestError):
            engine.resume(given, tokens, parents)
        engine.check()
        assert [row.tokens for row in (*rows, *other)] == [PROMPT, PROMPT, [1, 2]]
    engine.resume(rows, [4, 5], [0, 0])
    assert [row.tokens for row in rows] == [[*PROMPT, 4], [*PROMPT, 5]]


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
