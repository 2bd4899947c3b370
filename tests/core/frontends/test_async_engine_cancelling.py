"""AsyncEngine: requests that are cancelled, and readers that leave."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from alphabet_model import AlphabetModel, Gate
from async_calls import CONFIG, LIMIT_S, LONG, collect, params, run, until_idle
from paged_core import (
    AsyncEngine,
    Stream,
)
from toy_tokenizers import CharacterTokenizer
from waiting import until


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


def handed_over(stream: Stream) -> Coroutine[Any, Any, object]:
    return stream.hand_to(lambda delta: True)


@pytest.mark.parametrize("reading", [collect, Stream.aresult, handed_over])
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
