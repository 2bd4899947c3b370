"""AsyncEngine, as servers and threads see it: streams end, cancels answer, nothing hangs."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from alphabet_model import AlphabetModel, Gate
from paged_core import (
    AsyncEngine,
    Engine,
    EngineBusyError,
    EngineConfig,
    EngineDeadError,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
    Stream,
    StreamDelta,
)
from toy_tokenizers import CharacterTokenizer, ChokingTokenizer
from waiting import until

CONFIG = EngineConfig(num_blocks=256, attention_backend="reference")
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
LIMIT_S = 120.0


@pytest.fixture
def model() -> AlphabetModel:
    return AlphabetModel()


@pytest.fixture
def engine(model: AlphabetModel) -> Iterator[AsyncEngine]:
    with AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        yield engine


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 5, **fields})


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, LIMIT_S)

    return asyncio.run(limited())


def in_threads(*works: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not failures, failures


async def collect(stream: Stream) -> list[StreamDelta]:
    return [delta async for delta in stream]


def text_of(deltas: list[StreamDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


# ---- reading -----------------------------------------------------------------------------------------------------


def test_a_thread_reads_a_stream(engine: AsyncEngine) -> None:
    stream = engine.submit("A", params())
    deltas = list(stream)
    assert text_of(deltas) == "BCDEF"
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert stream.result(LIMIT_S).outputs[0].text == "BCDEF"
    assert list(stream) == []


def test_an_event_loop_reads_a_stream(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.submit("A", params())
        deltas = await collect(stream)
        assert text_of(deltas) == "BCDEF"
        assert (await stream.aresult()).outputs[0].text == "BCDEF"

    run(main())


def test_results_need_no_reading(engine: AsyncEngine) -> None:
    assert engine.submit([33], params()).result(LIMIT_S).outputs[0].text == "BCDEF"
    chat = engine.submit([{"role": "user", "content": "X"}], params()).result(LIMIT_S)
    assert chat.prompt == "user: X\nassistant:"

    async def main() -> Any:
        return await engine.submit("A", params()).aresult()

    assert run(main()).outputs[0].text == "BCDEF"


def test_n_samples_come_as_deltas_of_their_index(engine: AsyncEngine) -> None:
    deltas = list(engine.submit("A", params(n=3, temperature=0.5)))
    assert [text_of(deltas, index) for index in range(3)] == ["BCDEF"] * 3
    assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2]


def test_a_stop_string_ends_a_stream_before_it(engine: AsyncEngine) -> None:
    deltas = list(engine.submit("A", params(stop="DE", max_tokens=20)))
    assert text_of(deltas) == "BC"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "DE")
    until(lambda: not engine.engine.has_work)


def test_a_slow_reader_gets_what_it_missed_in_one_delta(engine: AsyncEngine) -> None:
    stream = engine.submit("A", params(max_tokens=90, ignore_eos=True, logprobs=0))
    result = stream.result(LIMIT_S)
    (delta,) = stream
    assert delta.text == result.outputs[0].text
    assert delta.token_ids == result.outputs[0].token_ids
    assert delta.logprobs == result.outputs[0].logprobs
    assert delta.finish_reason == "length"


def test_several_event_loops_and_threads_read_at_once(engine: AsyncEngine) -> None:
    async def many(first: int) -> None:
        streams = [engine.submit(chr(65 + first + number), params()) for number in range(8)]
        for number, deltas in enumerate(await asyncio.gather(*map(collect, streams))):
            assert text_of(deltas) == "".join(chr(66 + first + number + step) for step in range(5))

    def blocking() -> None:
        for _ in range(5):
            assert text_of(list(engine.submit("A", params()))) == "BCDEF"

    in_threads(*(lambda first=first: run(many(first)) for first in range(3)), blocking, blocking)


def test_a_step_wakes_each_event_loop_once_for_all_its_streams(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()

    async def main() -> int:
        loop = asyncio.get_running_loop()
        calls = 0
        real = loop.call_soon_threadsafe

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        streams = [engine.submit("A", params(max_tokens=20)) for _ in range(50)]
        tasks = [asyncio.ensure_future(collect(stream)) for stream in streams]
        await asyncio.sleep(0.05)
        gate.open()
        assert all(text_of(deltas) == "BCDEFGHIJKLMNOPQRSTU" for deltas in await asyncio.gather(*tasks))
        return calls

    assert run(main()) <= gate.num_steps + 1


def test_a_thousand_open_streams_all_end(model: AlphabetModel) -> None:
    async def main() -> None:
        async with AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
            streams = [engine.submit("A", params(max_tokens=3)) for _ in range(1000)]
            for deltas in await asyncio.gather(*map(collect, streams)):
                assert text_of(deltas) == "BCD"

    run(main())


# ---- refusing ----------------------------------------------------------------------------------------------------


def test_what_is_no_prompt_is_refused_at_once(engine: AsyncEngine) -> None:
    for bad in ("", [], object(), [{"text": "no role"}]):
        with pytest.raises(InvalidRequestError):
            engine.submit(bad, params())


def test_what_the_engine_refuses_is_raised_by_the_stream(engine: AsyncEngine) -> None:
    good = engine.submit("A", params())
    for bad in ([1000], [1] * 300):
        with pytest.raises(InvalidRequestError):
            engine.submit(bad, params()).result(LIMIT_S)
        with pytest.raises(InvalidRequestError):
            list(engine.submit(bad, params()))
    assert good.result(LIMIT_S).outputs[0].text == "BCDEF"


def test_an_id_can_be_used_again_only_when_its_request_has_ended(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    first = engine.submit("A", params(), request_id="mine")
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        engine.submit("B", params(), request_id="mine")
    gate.open()
    assert first.result(LIMIT_S).request_id == "mine"
    second = engine.submit("B", params(), request_id="mine")
    first.cancel()
    assert second.result(LIMIT_S).outputs[0].text == "CDEFG"


def test_an_error_of_one_request_is_told_in_its_own_last_delta(engine: AsyncEngine) -> None:
    def broken(input_ids: Any, scores: Any) -> Any:
        raise ZeroDivisionError("mine")

    good, bad = engine.submit("A", params()), engine.submit("A", params(logits_processors=[broken]))
    last = list(bad)[-1]
    assert last.finish_reason == "error" and last.error is not None and "mine" in last.error
    assert bad.result(LIMIT_S).error == last.error
    assert good.result(LIMIT_S).outputs[0].text == "BCDEF"


def test_a_slow_reader_still_gets_the_text_from_before_an_error(engine: AsyncEngine) -> None:
    def breaks_later(input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[-1] == 4:
            raise ZeroDivisionError("mine")
        return scores

    stream = engine.submit("A", params(logits_processors=[breaks_later]))
    stream.result(LIMIT_S)
    text, end = stream
    assert (text.text, text.finish_reason, text.error) == ("BCD", None, None)
    assert (end.text, end.token_ids, end.finish_reason) == ("", (), "error")
    assert end.error is not None and "mine" in end.error


def test_a_tokenizer_that_chokes_ends_one_request_only(model: AlphabetModel) -> None:
    with AsyncEngine(model, tokenizer=ChokingTokenizer(), config=CONFIG) as engine:
        bad, good = engine.submit([38], params()), engine.submit([50], params())
        assert good.result(LIMIT_S).outputs[0].finish_reason == "length"
        result = bad.result(LIMIT_S)
        assert result.outputs[0].finish_reason == "error" and "token 40" in str(result.error)
        until(lambda: not engine.engine.has_work)


# ---- cancelling --------------------------------------------------------------------------------------------------


def test_cancel_answers_with_a_final_delta_and_a_result(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    gate.shuts_at = 5
    gate.open()
    stream = engine.submit("A", LONG)
    for delta in stream:
        until(lambda: gate.num_steps >= 5)
        stream.cancel()
        stream.cancel()
        gate.open()
        last = delta
    assert last.finish_reason == "abort"
    result = stream.result(LIMIT_S)
    assert result.outputs[0].finish_reason == "abort"
    assert 1 <= len(result.outputs[0].token_ids) < 200
    stream.cancel()


def test_a_request_cancelled_before_it_ran_answers_too(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    engine.submit("B", params())
    stream = engine.submit("A", LONG)
    stream.cancel()
    gate.open()
    assert stream.result(LIMIT_S).outputs[0].finish_reason == "abort"


def until_idle(engine: AsyncEngine) -> None:
    until(lambda: not engine.engine.has_work and engine.num_open == 0)


def test_leaving_a_loop_cancels_the_request(model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    with AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG) as engine:

        def submit() -> Stream:
            gate.shuts_at = gate.num_steps + 9
            gate.open()
            return engine.submit("A", LONG)

        def held() -> bool:
            return gate.num_steps == gate.shuts_at

        async def main() -> None:
            stream = submit()
            async for _ in stream:
                until(held)
                break
            gate.open()
            assert (await stream.aresult()).outputs[0].finish_reason == "abort"

        run(main())
        stream = submit()
        for _ in stream:
            until(held)
            break
        gate.open()
        assert stream.result(LIMIT_S).outputs[0].finish_reason == "abort"
        until_idle(engine)


@pytest.mark.parametrize("reading", [collect, Stream.aresult])
def test_cancelling_the_task_that_waits_cancels_the_request(
    engine: AsyncEngine, model: AlphabetModel, reading: Callable[[Stream], Coroutine[Any, Any, Any]]
) -> None:
    gate = model.before_forward = Gate()

    async def main() -> None:
        stream = engine.submit("A", LONG)
        task = asyncio.ensure_future(reading(stream))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        assert (await stream.aresult()).outputs[0].finish_reason == "abort"

    run(main())


def test_a_dropped_stream_is_cancelled(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    stream = engine.submit("A", LONG)
    until(lambda: gate.num_steps > 0)
    del stream
    gc.collect()
    gate.open()
    until_idle(engine)
    assert gate.num_steps < 100


def test_a_loop_that_dies_while_it_listens_hurts_nobody(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    other = engine.submit("A", params())

    async def main() -> None:
        for _ in range(3):
            task = asyncio.ensure_future(collect(engine.submit("B", LONG)))
            await asyncio.sleep(0)
            del task

    run(main())
    gate.open()
    assert other.result(LIMIT_S).outputs[0].text == "BCDEF"
    until_idle(engine)


def test_waiting_with_a_timeout_does_not_end_the_request(engine: AsyncEngine, model: AlphabetModel) -> None:
    gate = model.before_forward = Gate()
    stream = engine.submit("A", params())
    with pytest.raises(TimeoutError):
        stream.result(timeout=0.01)
    gate.open()
    assert stream.result(LIMIT_S).outputs[0].text == "BCDEF"


# ---- closing and dying -------------------------------------------------------------------------------------------


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
