"""Exchange: carries one call through the engine, and joins the streams of its prompts. Knows no HTTP and no
TorchServe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

from paged_core import AsyncEngine, EngineBusyError, GenerationOutput, InvalidRequestError, Stream, StreamDelta
from paged_serving.outcomes import as_outcome
from paged_serving.protocol.call import Call
from paged_serving.protocol.failures import CallError, Failure
from paged_serving.protocol.parsing import ProtocolError, in_words_of

_T = TypeVar("_T")


class Listener(Protocol[_T]):
    """Whom an Exchange tells its chunks. One that waits for nothing is always ready."""

    @property
    def ready(self) -> bool:
        """Whether ``tell`` may be called: it must not wait."""
        ...

    def write(self, chunks: list[Any], large: bool) -> _T:
        """What is told of ``chunks``, as bytes say. ``large``: it may take a while, and is called in a thread."""
        ...

    def tell(self, told: _T) -> None: ...

    async def wait_and_tell(self, told: _T) -> None:
        """Where ``tell`` would have to wait."""
        ...


def compile_grammar(call: Call) -> None:
    """Compile the call's grammar, if it has one. This may take long: call it in a thread, before the Exchange.

    Raises:
        CallError: the machine is too busy.
        InvalidRequestError: the grammar can't be used, or not within the limits.
    """
    try:
        if call.grammar is not None:
            call.grammar.compile()
    except EngineBusyError as error:
        raise CallError(Failure.OVERLOADED, str(error)) from error


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
        if len(self._streams) == 1:
            self.results = [await self._result(0)]
        else:
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

    async def tell(self, listener: Listener[_T]) -> None:
        """Tell ``listener`` the chunks of a streamed call. The first come with the first news of the engine, so that
        what it refuses is told before anything was sent. Raises as ``finish``, and what ``listener`` raises.
        """
        telling = _Telling(self.call, listener, self._in_thread)
        if len(self._streams) == 1:
            await self._tell_of(0, telling)
        else:
            await _all_or_none([self._tell_of(number, telling) for number in range(len(self._streams))])
        await telling.tell_end(await self.finish())

    async def _tell_of(self, number: int, telling: _Telling[Any]) -> None:
        def take(delta: StreamDelta) -> bool:
            if delta.finish_reason is not None:
                self._check(number, delta.finish_reason, delta.error)
            return telling.tell(number, delta)

        try:
            while (delta := await self._streams[number].hand_to(take)) is not None:
                await telling.wait_and_tell(number, delta)
        except InvalidRequestError as error:
            raise self._refused(number, error) from error

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

    def _check(self, number: int, finish_reason: str | None, error: str | None) -> None:
        if finish_reason == "abort":
            raise self.aborted
        if finish_reason == "error":
            which = None if len(self._streams) == 1 else self._name_of(number)
            raise CallError(Failure.GENERATION, error or "the generation failed", which)


class _Telling(Generic[_T]):
    """A call's chunks on their way to who listens, one after another."""

    def __init__(self, call: Call, listener: Listener[_T], in_thread: Callable[..., Awaitable[Any]]) -> None:
        self._call, self._listener, self._in_thread = call, listener, in_thread
        self._untold = list(call.first_chunks())
        self._begun: set[tuple[int, int]] = set()  # (prompt, choice), of a call that retells
        self._turn = asyncio.Lock()

    def tell(self, number: int, delta: StreamDelta) -> bool:
        """False: not without waiting."""
        if self._turn.locked() or not self._listener.ready or self._may_be_large(number, delta):
            return False
        self._listener.tell(as_outcome(self._written, False, self._call.chunks, number, delta))
        return True

    async def wait_and_tell(self, number: int, delta: StreamDelta) -> None:
        large = self._may_be_large(number, delta)
        self._begun.add((number, delta.index))
        await self._wait_and_tell(large, self._call.chunks, number, delta)

    async def tell_end(self, results: Sequence[GenerationOutput]) -> None:
        await self._wait_and_tell(self._call.retells, self._call.last_chunks, results)

    def _may_be_large(self, number: int, delta: StreamDelta) -> bool:
        """To make such chunks, and to write them as JSON, is a thread's work, and not the event loop's."""
        if delta.prompt_logprobs is not None:
            return True
        return self._call.retells and (delta.finish_reason is not None or (number, delta.index) not in self._begun)

    async def _wait_and_tell(self, large: bool, make: Callable[..., list[Any]], *args: Any) -> None:
        async with self._turn:
            if large:
                told = await self._in_thread(as_outcome, self._written, large, make, *args)
            else:
                told = as_outcome(self._written, large, make, *args)
            await self._listener.wait_and_tell(told)

    def _written(self, large: bool, make: Callable[..., list[Any]], *args: Any) -> _T:
        untold, self._untold = self._untold, []
        return self._listener.write(untold + make(*args), large)


async def _all_or_none(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """When one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
