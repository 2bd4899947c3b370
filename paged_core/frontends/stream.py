"""Stream: the results of one request, read by a thread or an event loop. It is the reader's handle of a Channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from paged_core.frontends.channel import Bell, Channel, EndOfStream
from paged_core.text.outputs import GenerationOutput, StreamDelta

_T = TypeVar("_T")


class Stream:
    """What a request produces, as it comes: ``for delta in stream`` in a thread, ``async for delta in stream`` in an
    event loop. Or wait for all of it: ``stream.result()``, ``await stream.aresult()``.

    Nobody's request is computed for nothing: leaving a loop early, cancelling the task that waits, or dropping the
    Stream cancels the request. A cancelled request still ends with a final delta and a result ("abort").

    Iterating and waiting raise InvalidRequestError if the engine refused the request, EngineDeadError if it has
    failed, and ReentryError in the engine's own thread, where nothing would ever come. An error while the request runs
    is no exception: its finish_reason is "error". That and "abort" come with a delta of their own, without text.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def request_id(self) -> str:
        return self._channel.request_id

    @property
    def ended(self) -> bool:
        """Whether all deltas have come, read or unread."""
        return self._channel.ended

    def cancel(self) -> None:
        """End the request soon. Callable from anywhere, and more than once."""
        self._channel.cancel()

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for the end. Deltas that were not read stay readable.

        Raises:
            TimeoutError: the request did not end in ``timeout`` seconds; it goes on.
        """
        news = Bell()
        result = self._channel.result(news)
        if result is None:
            if not news.wait(timeout):
                self._channel.forget(news)
                raise TimeoutError(f"request {self.request_id} has not ended in {timeout} s")
            result = self._channel.result(news)
        assert result is not None
        return result

    async def aresult(self) -> GenerationOutput:
        """Wait for the end. If this is cancelled, so is the request (asyncio.shield prevents it)."""
        news = asyncio.get_running_loop().create_future()
        result = self._channel.result(news)
        if result is None:
            await self._wait(news)
            result = self._channel.result(news)
        assert result is not None
        return result

    def __iter__(self) -> Iterator[StreamDelta]:
        return _Deltas(self, self._channel)

    def __aiter__(self) -> AsyncIterator[StreamDelta]:
        return _AsyncDeltas(self, self._channel)

    async def hand_to(self, take: Callable[[StreamDelta], bool]) -> StreamDelta | None:
        """Call ``take`` with each delta as it comes, from the event loop itself: no task is woken for a delta, which
        would cost a server more than the delta does. Returns the first delta for which ``take`` returns False, or None
        at the end; await it again for the deltas that follow. Raises what iterating and ``take`` raise.
        """
        hand = _Hand(self._channel, take)
        hand.set_result()
        return await self._wait(hand.outcome)

    async def _wait(self, news: asyncio.Future[_T]) -> _T:
        try:
            return await news
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __del__(self) -> None:
        self._channel.cancel()


class _Deltas:
    """One ``for`` loop over a stream. When the loop is left, this object is deleted, which cancels the request."""

    def __init__(self, stream: Stream, channel: Channel) -> None:
        self._stream = stream  # kept, so that the stream isn't deleted while it is read
        self._channel = channel

    def __iter__(self) -> _Deltas:
        return self

    def __next__(self) -> StreamDelta:
        while True:
            try:
                news = self._channel.take(Bell)
            except EndOfStream:
                raise StopIteration from None
            if isinstance(news, StreamDelta):
                return news
            news.wait()

    def __del__(self) -> None:
        self._channel.cancel()


class _AsyncDeltas:
    """One ``async for`` loop over a stream. When the loop is left, this object is deleted, which cancels the
    request."""

    def __init__(self, stream: Stream, channel: Channel) -> None:
        self._stream = stream
        self._channel = channel

    def __aiter__(self) -> _AsyncDeltas:
        return self

    async def __anext__(self) -> StreamDelta:
        make_future = asyncio.get_running_loop().create_future
        while True:
            try:
                news = self._channel.take(make_future)
            except EndOfStream:
                raise StopAsyncIteration from None
            if isinstance(news, StreamDelta):
                return news
            await self._stream._wait(news)

    async def aclose(self) -> None:
        self._channel.cancel()

    def __del__(self) -> None:
        self._channel.cancel()


class _Hand:
    """Takes deltas out of a channel in the event loop. It can be awaited like a Future, and more than once."""

    def __init__(self, channel: Channel, take: Callable[[StreamDelta], bool]) -> None:
        self._channel, self._take = channel, take
        self.outcome: asyncio.Future[StreamDelta | None] = asyncio.get_running_loop().create_future()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.outcome.get_loop()

    def done(self) -> bool:
        return self.outcome.done()

    def set_result(self, result: None = None) -> None:
        """Called when there may be deltas."""
        try:
            while not isinstance(news := self._channel.take(self._itself), _Hand):
                if not self._take(news):
                    self.outcome.set_result(news)
                    return
        except EndOfStream:
            self.outcome.set_result(None)
        except BaseException as error:  # raised to whoever awaits the outcome; later waiters are still woken
            self.outcome.set_exception(error)

    def _itself(self) -> _Hand:
        return self
