"""Exchange: carries one call through the engine, and joins the streams of its prompts. Knows no HTTP and no
TorchServe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from paged_core import AsyncEngine, EngineBusyError, GenerationOutput, InvalidRequestError, Stream, StreamDelta
from paged_serving.outcomes import as_outcome
from paged_serving.protocol.call import Call
from paged_serving.protocol.failures import CallError, Failure
from paged_serving.protocol.parsing import ProtocolError, in_words_of

_News = tuple[int, StreamDelta | Exception | None]  # None: that stream has ended


class Chunks(NamedTuple):
    """What is sent at once."""

    told: list[Any]
    large: bool  # so large that a thread, not the event loop, should make it and write it as JSON


class Exchange:
    """Submits all prompts of ``call`` at once; ``close`` must follow, whatever happens. Belongs to one event loop.

    Args:
        aborted: what the client is told when its requests end in an abort.
        in_thread: awaits what a function returns in a thread.

    Raises:
        CallError: the engine is busy.
        EngineDeadError: the engine takes no requests any more.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        call: Call,
        *,
        aborted: str = "the request was cancelled",
        in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        self.call = call
        self.results: list[GenerationOutput] = []  # one a prompt, when all have ended
        self.aborted = CallError(Failure.CUT, aborted)
        self._in_thread = in_thread
        self._streams: list[Stream] = []
        try:
            for prompt in call.prompts:
                self._streams.append(engine.submit(prompt, call.params))
        except EngineBusyError as error:
            self.close()
            raise CallError(Failure.OVERLOADED, str(error)) from error
        except BaseException:
            self.close()
            raise

    @property
    def request_ids(self) -> set[str]:
        return {stream.request_id for stream in self._streams}

    def close(self) -> None:
        """Cancel what still runs. Callable from any thread."""
        for stream in self._streams:
            stream.cancel()

    async def finish(self) -> Sequence[GenerationOutput]:
        """The results, when all have ended.

        Raises:
            CallError: it was cut, or the engine could not finish it.
            InvalidRequestError: the engine refused it.
        """
        self.results = list(await asyncio.gather(*[self._result(number) for number in range(len(self._streams))]))
        for number, result in enumerate(self.results):
            for output in result.outputs:
                self._check(number, output.finish_reason, result.error)
        return self.results

    async def _result(self, number: int) -> GenerationOutput:
        try:
            return await self._streams[number].aresult()
        except InvalidRequestError as error:
            raise self._refused(number, error) from error

    async def answer(self) -> Any:
        """The body of a call that isn't streamed, when all has ended. Raises as ``finish``."""
        return await self._in_thread(as_outcome, self.call.answer, await self.finish())

    async def chunks(self) -> AsyncIterator[Chunks]:
        """The chunks of a streamed call, several at a time. The first come with the engine's first delta, so that a
        refusal is raised before anything was sent. Raises as ``finish``."""
        chunks, begun = list(self.call.first_chunks()), set[tuple[int, int]]()
        async for number, delta in self._news():
            self._check(number, delta.finish_reason, delta.error)
            first = (number, delta.index) not in begun
            begun.add((number, delta.index))
            retells = self.call.retells and (first or delta.finish_reason is not None)
            large = retells or delta.prompt_logprobs is not None
            yield Chunks(chunks + await self._made(large, self.call.chunks, number, delta), large)
            chunks = []
        if last := await self._made(self.call.retells, self.call.last_chunks, await self.finish()):
            yield Chunks(last, self.call.retells)

    async def _news(self) -> AsyncIterator[tuple[int, StreamDelta]]:
        async for number, news in _merge(self._streams):
            if isinstance(news, InvalidRequestError):
                raise self._refused(number, news) from news
            if isinstance(news, Exception):
                raise news
            yield number, news

    def _refused(self, number: int, error: InvalidRequestError) -> ProtocolError:
        """``error`` with the protocol's names of fields. If there are several prompts, it names the refused one."""
        own = self._name_of(number)
        told = in_words_of({**self.call.named, "prompt": own}, error)
        if len(self._streams) == 1 or own in str(told):
            return told
        return ProtocolError(f"{own}: {told}", told.param)

    def _name_of(self, number: int) -> str:
        name = self.call.named.get("prompt", "prompt")
        return name if len(self._streams) == 1 else f"{name}[{number}]"

    async def _made(self, large: bool, make: Callable[..., list[Any]], *args: Any) -> list[Any]:
        made: list[Any] = await self._in_thread(as_outcome, make, *args) if large else as_outcome(make, *args)
        return made

    def _check(self, number: int, finish_reason: str | None, error: str | None) -> None:
        if finish_reason == "abort":
            raise self.aborted
        if finish_reason == "error":
            which = None if len(self._streams) == 1 else self._name_of(number)
            raise CallError(Failure.GENERATION, error or "the generation failed", which)


async def _merge(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, StreamDelta | Exception]]:
    """Yields (number of the stream, its delta) as they come. An exception of a stream comes in place of a delta."""
    if len(streams) == 1:
        try:
            async for delta in streams[0]:
                yield 0, delta
        except Exception as error:
            yield 0, error
        return
    news: asyncio.Queue[_News] = asyncio.Queue(maxsize=len(streams))
    tasks = [asyncio.ensure_future(_pump(number, stream, news)) for number, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            number, piece = await news.get()
            if piece is None:
                num_open -= 1
            else:
                yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(number: int, stream: Stream, news: asyncio.Queue[_News]) -> None:
    try:
        async for delta in stream:
            await news.put((number, delta))
    except Exception as error:
        await news.put((number, error))
    else:
        await news.put((number, None))
