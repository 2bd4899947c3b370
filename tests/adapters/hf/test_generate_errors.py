"""What one caller's own code or the model does wrong reaches those whom it concerns, and leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from concurrent_calls import (
    GREEDY,
    KINDS,
    Collecting,
    host_of,
    one_of_each,
    prompt,
    together,
    used_blocks,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


# ---- errors belong to their caller -------------------------------------------------------------------------------


class Trouble(Exception):
    pass


class Raising(BaseStreamer):
    """Raises ``error`` when it is called for the third time, whatever it is used as."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.put(input_ids)
        return scores

    def put(self, value: Any) -> None:
        self.num_calls += 1
        if self.num_calls == 3:
            raise self.error

    def end(self) -> None:
        pass

    def criterion(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def prefix(self, row: int, ids: Tensor) -> list[int]:
        self.put(ids)
        return [7, 8]


PLACES: dict[str, Callable[[Raising], dict[str, Any]]] = {
    "processor": lambda raising: {"logits_processor": LogitsProcessorList([raising])},
    "criterion": lambda raising: {"stopping_criteria": StoppingCriteriaList([raising.criterion])},
    "prefix": lambda raising: {"prefix_allowed_tokens_fn": raising.prefix},
    "free streamer": lambda raising: {"streamer": raising},
    "lockstep streamer": lambda raising: {"streamer": raising, "repetition_penalty": 1.3},
    "beams": lambda raising: {"logits_processor": LogitsProcessorList([raising]), "num_beams": 3},
}


@pytest.mark.parametrize("error", [Trouble("mine"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
def test_what_a_callers_own_parts_raise_reaches_that_caller_alone(model: Any, error: BaseException) -> None:
    raising = [
        lambda place=place: model.generate(**prompt(3), **GREEDY, **place(Raising(error))) for place in PLACES.values()
    ]
    sound = [one_of_each(model, number) for number in range(8)]
    answers = together([*raising, *(call for _, call, _ in sound)])
    for place, answer in zip(PLACES, answers, strict=False):
        assert answer is error, place
    for (kind, _, expected), answer in zip(sound, answers[len(PLACES) :], strict=True):
        assert answer[0] == expected, kind
        assert answer[1].tier == KINDS[kind][1], kind
    assert used_blocks(model) == 0
    assert model.generate(**prompt(3), **GREEDY).tolist() == model.generate.stock(**prompt(3), **GREEDY).tolist()
    assert model.generate.last_report().tier == "native"


def test_a_caller_that_waits_in_its_own_code_holds_nobody_up(model: Any) -> None:
    others_are_done = threading.Event()
    held = []

    class Waiting(Raising):
        def put(self, value: Any) -> None:
            self.num_calls += 1
            if self.num_calls == 3:
                held.append(others_are_done.wait(60))

    def others() -> Any:
        answers = together([call for _, call, _ in sound])
        others_are_done.set()
        return answers

    sound = [one_of_each(model, number) for number in range(8)]
    calls = [
        lambda place=place: model.generate(**prompt(3), **GREEDY, **place(Waiting(Trouble())))
        for place in PLACES.values()
    ]
    *waited, answers = together([*calls, others])
    assert held == [True] * len(PLACES)
    assert all(isinstance(answer, Tensor) for answer in waited), waited
    assert [answer for answer, _ in answers] == [expected for _, _, expected in sound]


def test_a_model_that_fails_once_fails_the_calls_of_that_step_and_no_later_one(model: Any) -> None:
    options = {"repetition_penalty": 1.3, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate.stock(**prompt(1), **options)
    mlp = model.model.layers[1].mlp
    forward, countdown = mlp.forward, [10]

    def fails(hidden: Tensor) -> Tensor:
        countdown[0] -= 1
        if -20 < countdown[0] <= 0:
            raise RuntimeError("the device has had enough")
        return forward(hidden)

    mlp.forward = fails
    answers = together([lambda: model.generate(**prompt(1), **options) for _ in range(4)])
    del mlp.forward
    assert any(isinstance(answer, Exception) for answer in answers)
    for answer in answers:
        if isinstance(answer, Exception):
            assert "the device has had enough" in str(answer)
        else:
            assert torch.equal(answer, expected)
    assert torch.equal(model.generate(**prompt(1), **options), expected)
    assert model.generate.last_report().tier == "native"
    assert used_blocks(model) == 0


def test_where_no_thread_can_be_started_stock_answers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for options in ({}, {"num_beams": 2}):
            answer = model.generate(**prompt(1), **GREEDY, **options)
            assert "can't start new thread" in str(model.generate.last_report())
            assert torch.equal(answer, model.generate.stock(**prompt(1), **GREEDY, **options))
    model.generate(**prompt(1), **GREEDY)
    assert model.generate.last_report().tier == "native"


# ---- threads -----------------------------------------------------------------------------------------------------


def test_whoever_returns_last_leaves_no_thread_even_if_two_end_at_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(model)
    end, closing = host._end, threading.Barrier(2)
    monkeypatch.setattr(host, "_end", lambda call: (time.sleep(0.05), end(call)))
    left: list[bool] = []

    def call() -> None:
        model.generate(**prompt(1), **GREEDY, streamer=Both())
        left.append(any(thread.name == "paged-generate" for thread in threading.enumerate()))

    class Both(Collecting):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.seen) == 12:
                closing.wait(60)  # before the last token, so that both end in the same moment

    assert together([call, call]) == [None, None]
    assert left[-1] is False


def test_no_thread_is_left_when_a_call_returns_or_raises(model: Any) -> None:
    before = threading.enumerate()
    for options in ({}, {"num_beams": 2}, {"streamer": Collecting()}):
        model.generate(**prompt(1), **GREEDY, **options)
        assert threading.enumerate() == before
    for place in PLACES.values():
        with pytest.raises(Trouble):
            model.generate(**prompt(1), **GREEDY, **place(Raising(Trouble())))
        assert threading.enumerate() == before


def test_two_hundred_calls_leave_no_more_threads_in_the_system(model: Any) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    model.generate(**prompt(1), max_new_tokens=2, do_sample=False)
    before = count()
    for seed in range(200):
        model.generate(**prompt(seed), max_new_tokens=1 + seed % 2, num_beams=1 + seed % 3 // 2, do_sample=False)
    assert model.generate.last_report().tier == "native"
    assert count() <= before + 2  # the system may see the last one off a moment later than Python
