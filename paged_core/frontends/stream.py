"""Stream: the results of one request, read by a thread or an event loop. This file knows nothing of engines.

The producer and the reader share a Channel; a Stream is the reader's handle. The producer never waits, and wakes each
event loop once for all its streams that have got deltas.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar, Union

from paged_core.text.outputs import GenerationOutput, StreamDelta, join_deltas

_T = TypeVar("_T")
_JOIN_AFTER = 32  # unread deltas of one index, above which they are joined into one


class Bell:
    """Lets a thread wait, once. It is a bare lock, so that it can be rung in a forked child whatever other threads
    held."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the ring. Returns False if it does not come in ``timeout`` seconds."""
        return self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0))


_Waiter = Union[Bell, "asyncio.Future[None]", "_Hand"]
_W = TypeVar("_W", Bell, "asyncio.Future[None]", "_Hand")


class Wakeups:
    """The readers to wake after a step: threads one by one, and each event loop once for all its streams."""

    def __init__(self) -> None:
        self._in_loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None] | _Hand]] = {}

    def add(self, waiter: _Waiter) -> None:
        if isinstance(waiter, Bell):
            waiter.ring()
        else:
            self._in_loops.setdefault(waiter.get_loop(), []).append(waiter)

    def send(self) -> None:
        for loop, waiters in self._in_loops.items():
            with suppress(RuntimeError):  # the loop is closed, and nobody reads there any more
                loop.call_soon_threadsafe(_wake_all, waiters)


class Channel:
    """Deltas on their way from one producer to their readers.

    ``check_may_wait`` raises if a reader would wait in the producer's own thread, where its delta would never come.
    """

    def __init__(
        self, request_id: str, cancel: Callable[[Channel], None], check_may_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._check_may_wait = check_may_wait
        self.cancelled = False  # so that the producer is told only once or twice, however often a reader cancels
        self._lock = threading.Lock()  # held for moments only
        self._unread: dict[int, list[StreamDelta]] = {}  # by index, in the order of their first delta
        self._result: GenerationOutput | None = None
        self._error: Exception | None = None
        self._waiting: list[_Waiter] = []  # for any delta
        self._waiting_for_end: list[_Waiter] = []

    # ---- the producer --------------------------------------------------------------------------------------------

    def push(self, deltas: Sequence[StreamDelta], result: GenerationOutput | None, wakeups: Wakeups) -> None:
        """Add deltas. ``result`` comes with the last ones."""
        with self._lock:
            for delta in deltas:
                unread = self._unread.setdefault(delta.index, [])
                unread.append(delta)
                if len(unread) >= _JOIN_AFTER:
                    unread[:] = [join_deltas(unread)]
            self._result = result
            self._wake(wakeups)

    def fail(self, error: Exception, wakeups: Wakeups) -> None:
        """End the channel with an error instead of a result."""
        with self._lock:
            self._error = error
            self._wake(wakeups)

    def forked(self, error: Exception) -> None:
        """Called in a forked child, where no more deltas will come. The thread that held the lock in the parent doesn't
        exist there. Event loops don't continue there either, and what wakes them is shared with the parent, so it is
        left alone."""
        self._lock = threading.Lock()
        if not self.ended:
            self.fail(error, Wakeups())

    def _wake(self, wakeups: Wakeups) -> None:
        waiters, self._waiting = self._waiting, []
        if self.ended:
            waiters += self._waiting_for_end
            self._waiting_for_end = []
        for waiter in waiters:
            wakeups.add(waiter)

    # ---- readers -------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        if not self.ended and not self.cancelled:
            self.cancelled = True
            self._cancel(self)

    def take(self, make_waiter: Callable[[], _W]) -> StreamDelta | _W:
        """Return the next delta, or a new waiter that will be woken when there is one.

        Raises:
            EndOfStream: all deltas have been read.
            Exception: the error with which the request failed, once all its deltas have been read.
        """
        with self._lock:
            if self._unread:
                return self._next_unread()
            if self._error is not None:
                raise self._error
            if self._result is not None:
                raise EndOfStream
            self._check_may_wait()
            waiter = make_waiter()
            self._waiting.append(waiter)
            return waiter

    def _next_unread(self) -> StreamDelta:
        index = next(iter(self._unread))
        delta = join_deltas(self._unread.pop(index))
        if delta.finish_reason is None:
            return delta
        delta, *end = delta.parts()
        if end:
            self._unread[index] = end
        return delta

    def result(self, waiter: _Waiter) -> GenerationOutput | None:
        """Return the result, or None; ``waiter`` will then be woken at the end.

        Raises:
            Exception: the error with which the request failed.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._result is None:
                self._check_may_wait()
                self._waiting_for_end.append(waiter)
            return self._result

    def forget(self, waiter: _Waiter) -> None:
        """Forget ``waiter``, which no longer waits for the end."""
        with self._lock, suppress(ValueError):
            self._waiting_for_end.remove(waiter)


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


class EndOfStream(Exception):
    """All deltas have been read."""


def _wake_all(waiters: Sequence[asyncio.Future[None] | _Hand]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
