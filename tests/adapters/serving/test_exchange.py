"""A call under way, as every server carries it; and whether an engine does its work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from alphabet_model import AlphabetModel, Gate
from calls import Alphabet
from http_server import LIMIT_S, until
from paged_core import AsyncEngine, Engine, EngineConfig, InvalidRequestError, hookimpl
from paged_serving import CallError, CompletionCall, Exchange, Failure, trouble
from toy_tokenizers import CharacterTokenizer

CONFIG = EngineConfig(num_blocks=256, attention_backend="reference")


def call(alphabet: Alphabet, **fields: Any) -> CompletionCall:
    return CompletionCall({"prompt": ["A", "B"], "max_tokens": 3, "temperature": 0, **fields}, alphabet.served, "1")


def open_engine(model: AlphabetModel | None = None, **options: Any) -> AsyncEngine:
    return AsyncEngine(Engine(model or AlphabetModel(), CONFIG), tokenizer=CharacterTokenizer(), **options)


class Told:
    """Whoever listens: what was told, and which of it was made in a thread."""

    ready = True

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.large: list[bool] = []

    def write(self, chunks: list[Any], large: bool) -> list[Any]:
        self.large.append(large)
        return chunks

    def tell(self, told: list[Any]) -> None:
        self.chunks += told

    async def wait_and_tell(self, told: list[Any]) -> None:
        self.tell(told)


async def told_by(exchange: Exchange) -> Told:
    told = Told()
    await exchange.tell(told)
    return told


def test_streams_of_all_prompts_come_as_one(alphabet: Alphabet) -> None:
    async def main() -> list[Any]:
        exchange = Exchange(alphabet.engine, call(alphabet, stream=True, stream_options={"include_usage": True}))
        return (await told_by(exchange)).chunks

    *chunks, last = asyncio.run(main())
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["BCD", "CDE"]
    assert last["usage"]["completion_tokens"] == 6


def chunks_of(exchange: Exchange) -> Any:
    return asyncio.run(told_by(exchange)).chunks


def test_of_several_prompts_the_one_at_fault_is_told_by_its_place(alphabet: Alphabet) -> None:
    class Picky:
        @hookimpl
        def create_logits_processor(self, request: Any) -> None:
            if 36 in request.tokens:
                raise InvalidRequestError("D is too much", "prompt")
            if 37 in request.tokens:
                raise InvalidRequestError("E is too long", "max_tokens")

    def fail(token_ids: list[int]) -> None:
        if 34 in token_ids:
            raise RuntimeError("B is too hard")

    def told(which: type[Exception], prompts: list[str]) -> str:
        said = []
        for of in (lambda exchange: asyncio.run(exchange.finish()), chunks_of):
            with pytest.raises(which) as raised:
                of(Exchange(engine, call(alphabet, prompt=prompts, max_tokens=1, stream=of is chunks_of)))
            said.append(str(raised.value))
        assert said[0] == said[1]
        return said[0]

    engine = AsyncEngine(Engine(AlphabetModel(fail), CONFIG, plugins=[Picky()]), tokenizer=CharacterTokenizer())
    with engine:
        assert told(InvalidRequestError, ["A", "C", "D"]) == "prompt[2]: D is too much"
        assert told(InvalidRequestError, ["D"]) == "prompt: D is too much"
        assert told(InvalidRequestError, ["A", "E"]) == "prompt[1]: max_tokens: E is too long"
        assert told(CallError, ["A", "B"]).startswith("prompt[1]: ")
        assert not told(CallError, ["B"]).startswith("prompt")


def test_an_answer_is_made_in_a_thread(alphabet: Alphabet) -> None:
    made = []

    async def in_thread(function: Any, *args: Any) -> Any:
        made.append(args)
        return await asyncio.to_thread(function, *args)

    async def main() -> Any:
        return await Exchange(alphabet.engine, call(alphabet), in_thread=in_thread).answer()

    assert [choice["text"] for choice in asyncio.run(main())["choices"]] == ["BCD", "CDE"]
    assert len(made) == 1


def test_of_a_stream_only_what_may_be_large_is_made_in_a_thread(alphabet: Alphabet) -> None:
    made: list[Any] = []

    async def in_thread(function: Any, make: Any, *args: Any) -> Any:
        made.append(args)
        return await asyncio.to_thread(function, make, *args)

    async def num_large(**fields: Any) -> int:
        asked = call(alphabet, max_tokens=8, stream=True, stream_options={"include_usage": True}, **fields)
        told = await told_by(Exchange(alphabet.engine, asked, in_thread=in_thread))
        assert told.chunks[-1]["usage"]["completion_tokens"] == 16
        return sum(told.large)

    assert asyncio.run(num_large()) == len(made) == 0
    num = asyncio.run(num_large(echo=True))
    assert num == len(made) > 0, "made and written in one go"
    assert num <= 5, "the first and the last of each of two prompts, and the end"


def test_who_is_not_ready_is_told_all_in_the_same_order(alphabet: Alphabet) -> None:
    class Slow(Told):
        async def wait_and_tell(self, told: list[Any]) -> None:
            self.ready = not self.ready
            await asyncio.sleep(0.001)
            self.chunks += told

        def tell(self, told: list[Any]) -> None:
            self.ready = len(self.chunks) % 3 != 0
            self.chunks += told

    async def main(**fields: Any) -> list[Any]:
        told = Slow()
        told.ready = False
        asked = call(alphabet, max_tokens=30, stream=True, ignore_eos=True, **fields)
        await Exchange(alphabet.engine, asked).tell(told)
        return told.chunks

    for fields in ({}, {"echo": True}):
        texts = ["", ""]
        for chunk in asyncio.run(main(**fields)):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        whole = alphabet.answer(call(alphabet, max_tokens=30, ignore_eos=True, **fields))
        assert texts == [choice["text"] for choice in whole["choices"]]


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_is_closed_ends_with_what_the_server_says_of_it(gate: Gate, stream: bool) -> None:
    gate.shut()
    with open_engine(AlphabetModel(gate)) as engine:
        alphabet = Alphabet()
        alphabet.engine.close()

        async def main() -> Any:
            exchange = Exchange(engine, call(alphabet, stream=stream), aborted="you were too slow")
            exchange.close()
            gate.open()
            return await told_by(exchange) if stream else await exchange.answer()

        with pytest.raises(CallError, match="you were too slow") as cut:
            asyncio.run(main())
        assert cut.value.failure is Failure.CUT
        gate.open()


def test_one_that_an_engine_has_no_room_for_leaves_nothing_behind(gate: Gate, alphabet: Alphabet) -> None:
    gate.shut()
    with open_engine(AlphabetModel(gate), max_requests=2) as engine:
        first = engine.submit("A")
        with pytest.raises(CallError, match="2 requests are under way") as refused:
            Exchange(engine, call(alphabet))
        assert refused.value.failure is Failure.OVERLOADED
        gate.open()
        assert first.result(LIMIT_S).finished
        until(lambda: not engine.engine.has_work)
        both = [engine.submit("A"), engine.submit("B")]  # the prompt that had found room has given it back
        assert all(stream.result(LIMIT_S).finished for stream in both)


def test_an_engine_that_is_stuck_or_has_failed_is_in_trouble(gate: Gate) -> None:
    engine = open_engine(AlphabetModel(gate))
    assert trouble(engine, 0.1, "the limit") is None
    gate.shut()
    stream = engine.submit("A")
    until(lambda: trouble(engine, 0.1, "the limit") is not None)
    told = trouble(engine, 0.1, "the limit")
    assert told is not None and told.endswith("the limit is 0.1 s")
    gate.open()
    assert stream.result(LIMIT_S).finished
    engine.close()
    assert trouble(engine, 0.1, "the limit") == "the engine has failed"
