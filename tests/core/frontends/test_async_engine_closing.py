"""AsyncEngine: full, idle, closed, failed; no stream hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from alphabet_model import AlphabetModel, Gate
from async_calls import CONFIG, LIMIT_S, LONG, collect, in_threads, params, run
from paged_core import (
    AsyncEngine,
    Engine,
    EngineBusyError,
    EngineDeadError,
    RequestOutput,
    Stream,
)
from toy_tokenizers import CharacterTokenizer
from waiting import until


def test_commands_that_never_end_let_steps_go_on(engine: AsyncEngine) -> None:
    """Each look asks for the next, so the queue is never empty."""
    neighbour = engine.submit("A", params(max_tokens=40))
    done = threading.Event()

    def again(_: Engine) -> None:
        if not done.is_set():
            engine.look(again)

    engine.look(again)
    try:
        assert len(neighbour.result(LIMIT_S).outputs[0].token_ids) == 40
    finally:
        done.set()


def test_threads_that_submit_and_cancel_in_a_loop_let_steps_go_on(engine: AsyncEngine) -> None:
    neighbour = engine.submit("A", params(max_tokens=150, ignore_eos=True))
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            try:
                engine.submit("B", LONG).cancel()
            except EngineBusyError:
                time.sleep(0.001)

    def wait() -> None:
        try:
            assert len(neighbour.result(LIMIT_S).outputs[0].token_ids) == 150
        finally:
            done.set()

    in_threads(flood, flood, wait)


def test_a_full_engine_refuses_and_takes_more_when_some_have_ended() -> None:
    gate = Gate()
    with AsyncEngine(AlphabetModel(gate), tokenizer=CharacterTokenizer(), config=CONFIG, max_requests=9) as engine:
        streams = [engine.submit("A", params()) for _ in range(9)]
        for stream in streams[:4]:
            stream.cancel()  # they are under way until the engine has heard of it
        with pytest.raises(EngineBusyError, match="9 requests"):
            engine.submit("A", params())
        gate.open()
        assert {stream.result(LIMIT_S).outputs[0].finish_reason for stream in streams[4:]} == {"length"}
        assert engine.submit("A", params()).result(LIMIT_S).outputs[0].text == "BCDEF"


def test_looks_are_bounded_and_cancels_are_told_once() -> None:
    gate = Gate()
    with AsyncEngine(AlphabetModel(gate), tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        stream = engine.submit("A", params())
        until(lambda: gate.num_steps == 1)
        looks = []
        with pytest.raises(EngineBusyError, match="looks"):
            for _ in range(100_000):
                looks.append(engine.look(lambda engine: 7))
        before = engine.num_commands
        for _ in range(1000):
            stream.cancel()
        assert engine.num_commands == before + 1
        gate.open()
        assert {look.result(LIMIT_S) for look in looks} == {7}
        assert engine.look(lambda engine: 8).result(LIMIT_S) == 8


def test_a_full_queue_does_not_keep_an_engine_from_closing() -> None:
    gate = Gate()
    engine = AsyncEngine(AlphabetModel(gate), tokenizer=CharacterTokenizer(), config=CONFIG)
    streams = [engine.submit("A", LONG) for _ in range(3000)]
    until(lambda: gate.num_steps == 1)
    gate.open()
    engine.close(LIMIT_S)
    assert {stream.result(0).outputs[0].finish_reason for stream in streams} <= {"abort", "length"}


def test_close_ends_every_stream_with_an_abort(model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    gate.shuts_at = 9
    gate.open()
    engine = AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG)
    streams = [engine.submit("A", LONG) for _ in range(20)]

    def close() -> None:
        until(lambda: gate.num_steps == 9)
        with pytest.raises(TimeoutError):
            engine.close(0)
        gate.open()
        engine.close()

    in_threads(close, *(lambda stream=stream: stream.result(LIMIT_S) for stream in streams))
    for stream in streams:
        assert stream.result(0).outputs[0].finish_reason == "abort"
        assert list(stream)[-1].finish_reason == "abort"
    with pytest.raises(EngineDeadError, match="closed"):
        engine.submit("A")
    engine.close()


def test_an_engine_that_never_ran_closes(model: AlphabetModel) -> None:
    before = threading.active_count()
    engine = AsyncEngine(model, config=CONFIG)
    assert threading.active_count() == before
    engine.close()
    with pytest.raises(EngineDeadError):
        engine.submit([1])


def test_a_thread_that_could_not_be_started_is_started_by_the_next_request(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            engine.submit("A", params(), "mine")
        with pytest.raises(RuntimeError, match="can't start new thread"):
            engine.look(lambda engine: engine.spec)
    assert engine.submit("A", params(), "mine").result(LIMIT_S).outputs[0].text == "BCDEF"


def test_an_engine_whose_thread_never_started_closes(model: AlphabetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit("A")
    engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        engine.submit("A")


def test_an_idle_engine_sleeps_and_wakes(engine: AsyncEngine) -> None:
    for _ in range(3):
        assert engine.submit("A", params()).result(LIMIT_S).outputs[0].text == "BCDEF"
        steps = 0
        real = engine.engine.step

        def counting(real: Callable[[], list[RequestOutput]] = real) -> list[RequestOutput]:
            nonlocal steps
            steps += 1
            return real()

        engine.engine.step = counting  # type: ignore[method-assign]
        time.sleep(0.02)
        assert steps == 0
        engine.engine.step = real  # type: ignore[method-assign]


def test_when_the_engine_fails_for_good_no_stream_hangs(model: AlphabetModel) -> None:
    class Dying(Engine):
        num_steps = 0

        def step(self) -> list[RequestOutput]:
            self.num_steps += 1
            if self.num_steps == 4:
                raise MemoryError("no more")
            return super().step()

    gate = model.before_forward = Gate()
    engine = AsyncEngine(Dying(model, CONFIG), tokenizer=CharacterTokenizer())
    streams = [engine.submit("A", LONG) for _ in range(12)]

    def waits(stream: Stream) -> None:
        with pytest.raises(EngineDeadError, match="no more"):
            stream.result(LIMIT_S)
        seen = []
        with pytest.raises(EngineDeadError):
            seen += list(stream)

    async def awaits(stream: Stream) -> None:
        with pytest.raises(EngineDeadError):
            await collect(stream)
        with pytest.raises(EngineDeadError):
            await stream.aresult()

    gate.open()
    in_threads(
        *(lambda stream=stream: waits(stream) for stream in streams[:6]),
        *(lambda stream=stream: run(awaits(stream)) for stream in streams[6:]),
    )
    with pytest.raises(EngineDeadError, match="no more"):
        engine.submit("A")
    engine.close()


def test_threads_that_submit_cancel_and_close_at_random_all_come_home(model: AlphabetModel) -> None:
    engine = AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG)
    reasons: list[str | None] = []

    def client(seed: int) -> None:
        for number in range(15):
            try:
                stream = engine.submit("A", params(max_tokens=1 + (seed * number) % 20))
            except EngineDeadError:
                return
            if (seed + number) % 3 == 0:
                stream.cancel()
            reasons.append(stream.result(LIMIT_S).outputs[0].finish_reason)

    def closer() -> None:
        until(lambda: len(reasons) > 20)
        engine.close()

    in_threads(*(lambda seed=seed: client(seed) for seed in range(6)), closer)
    assert set(reasons) <= {"length", "abort"}
