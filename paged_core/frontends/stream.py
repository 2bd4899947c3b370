"""Stream: one request's news, read by a thread or an event loop. This file knows nothing of engines.

A Channel is what the producing side and the reading side share; a Stream is the reader's handle. The producer never
waits, and wakes each event loop once for all the streams that have news in it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar, Union

from paged_core.text.outputs import GenerationOutput, StreamDelta, join_deltas

_T = TypeVar("_T")
_JOIN_AFTER = 32  # unread deltas of one index that are joined into one


class Bell:
    """What a thread waits on, once. A bare lock: it can be rung in a forked child too, whatever others were at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """False: it did not ring in ``timeout`` seconds."""
        return self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0))


_Waiter = Union[Bell, "asyncio.Future[None]", "_Hand"]
_W = TypeVar("_W", Bell, "asyncio.Future[None]", "_Hand")


class Wakeups:
    """The readers to wake after a step: threads one by one, each event loop once for all its streams."""

    def __init__(self) -> None:
        self._in_loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None] | _Hand]] = {}

    def add(self, waiter: _Waiter) -> None:
        if isinstance(waiter, Bell):
            waiter.ring()
        else:
            self._in_loops.setdefault(waiter.get_loop(), []).append(waiter)

    def send(self) -> None:
        for loop, waiters in self._in_loops.items():
            with suppress(RuntimeError):  # that loop is closed: nobody reads there any more
                loop.call_soon_threadsafe(_wake_all, waiters)


class Channel:
    """Deltas on their way from one producer to their readers.

    ``check_may_wait`` raises where a reader waits in the producer's own thread: what it waits for would never come.
    """

    def __init__(
        self, request_id: str, cancel: Callable[[Channel], None], check_may_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._check_may_wait = check_may_wait
        self.cancelled = False  # however often it is asked for, the producer hears it once or twice
        self._lock = threading.Lock()  # held for moments only
        self._unread: dict[int, list[StreamDelta]] = {}  # by index, in the order of their first news
        self._result: GenerationOutput | None = None
        self._error: Exception | None = None
        self._waiting: list[_Waiter] = []  # for any news
        self._waiting_for_end: list[_Waiter] = []

    # ---- the producer --------------------------------------------------------------------------------------------

    def push(self, deltas: Sequence[StreamDelta], result: GenerationOutput | None, wakeups: Wakeups) -> None:
        """More news; ``result`` with the last."""
        with self._lock:
            for delta in deltas:
                unread = self._unread.setdefault(delta.index, [])
                unread.append(delta)
                if len(unread) >= _JOIN_AFTER:
                    unread[:] = [join_deltas(unread)]
            self._result = result
            self._wake(wakeups)

    def fail(self, error: Exception, wakeups: Wakeups) -> None:
        """There will be no result."""
        with self._lock:
            self._error = error
            self._wake(wakeups)

    def forked(self, error: Exception) -> None:
        """In a forked child, where no more news will come; who held the lock in the parent isn't here. Nor do event
        loops go on there: what would wake them is left alone, it is the parent's too."""
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
        """The next delta; or a new waiter, which will hear of news.

        Raises:
            EndOfStream: all deltas have been read.
            Exception: the error the request failed with, once all its deltas have been read.
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
        """The result; or None, and ``waiter`` will hear of the end.

        Raises:
            Exception: the error the request failed with.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._result is None:
                self._check_may_wait()
                self._waiting_for_end.append(waiter)
            return self._result

    def forget(self, waiter: _Waiter) -> None:
        """``waiter`` waits for the end no more."""
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
        """Whether all news has come, read or unread."""
        return self._channel.ended

    def cancel(self) -> None:
        """End the request soon. Callable from anywhere, and more than once."""
        self._channel.cancel()

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for the end. Deltas that nobody has read stay readable.

        Raises:
            TimeoutError: the end did not come in ``timeout`` seconds; the request goes on.
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
        """Wait for the end; being cancelled here cancels the request (asyncio.shield prevents it)."""
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
        """Each delta as it comes, handed to ``take`` by the event loop itself: no task is woken for it, which costs a
        server more than the delta does. Returns the first that ``take`` answers False to; None: that was the end. To be
        awaited again for those that follow. Raises what iterating and ``take`` raise.
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
    """One ``for`` loop over a stream; when the loop is left, this object goes, and the request with it."""

    def __init__(self, stream: Stream, channel: Channel) -> None:
        self._stream = stream  # held, so that it isn't dropped while it is read
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
    """One ``async for`` loop over a stream; when the loop is left, this object goes, and the request with it."""

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
    """Takes deltas out of a channel in the event loop. It waits for them as a Future does, and more than once."""

    def __init__(self, channel: Channel, take: Callable[[StreamDelta], bool]) -> None:
        self._channel, self._take = channel, take
        self.outcome: asyncio.Future[StreamDelta | None] = asyncio.get_running_loop().create_future()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.outcome.get_loop()

    def done(self) -> bool:
        return self.outcome.done()

    def set_result(self, result: None = None) -> None:
        """There is news, perhaps."""
        try:
            while not isinstance(news := self._channel.take(self._itself), _Hand):
                if not self._take(news):
                    self.outcome.set_result(news)
                    return
        except EndOfStream:
            self.outcome.set_result(None)
        except BaseException as error:  # it goes to who awaits the outcome; others are woken after us
            self.outcome.set_exception(error)

    def _itself(self) -> _Hand:
        return self


class EndOfStream(Exception):
    """All deltas have been read."""


def _wake_all(waiters: Sequence[asyncio.Future[None] | _Hand]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
