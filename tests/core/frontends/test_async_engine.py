"""AsyncEngine: threads and event loops read streams, and what can't be had is refused."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from alphabet_model import AlphabetModel, Gate
from async_calls import CONFIG, LIMIT_S, collect, in_threads, params, run, text_of
from paged_core import (
    AsyncEngine,
    InvalidRequestError,
    StreamDelta,
)
from toy_tokenizers import CharacterTokenizer, ChokingTokenizer
from waiting import until


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


def test_an_event_loop_hands_deltas_over_until_one_is_not_taken(engine: AsyncEngine) -> None:
    async def main() -> None:
        said: list[str] = []
        left: list[str] = []
        turns = itertools.cycle([False, True])

        def take(delta: StreamDelta) -> bool:
            if taken := next(turns):
                said.append(delta.text)
            return taken

        stream = engine.submit("A", params(max_tokens=50))
        while (delta := await stream.hand_to(take)) is not None:
            said.append(delta.text)
            left.append(delta.text)
        assert left and "".join(said) == (await stream.aresult()).outputs[0].text == "".join(map(chr, range(66, 116)))

    run(main())


def test_who_is_handed_deltas_hears_what_iterating_raises_and_what_he_raises(engine: AsyncEngine) -> None:
    def choke(delta: StreamDelta) -> bool:
        raise KeyError(delta.text)

    async def main() -> None:
        with pytest.raises(InvalidRequestError, match="the prompt has 300 tokens"):
            await engine.submit("A" * 300, params(max_tokens=200)).hand_to(choke)
        with pytest.raises(KeyError, match="B"):
            await engine.submit("A", params()).hand_to(choke)

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
