"""Channel: the deltas of one request on their way from the engine's thread to their reader. This file knows nothing of
engines.

The producer never waits, and wakes each event loop once for all its channels that have got deltas.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from paged_core.text.outputs import GenerationOutput, StreamDelta, join_deltas

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


class LoopWaiter(Protocol):
    """What waits in an event loop. A Future is one."""

    def get_loop(self) -> asyncio.AbstractEventLoop: ...

    def done(self) -> bool:
        """Return whether it waits no longer."""
        ...

    def set_result(self, result: None) -> None:
        """Called in that loop when there may be deltas."""
        ...


Waiter = Bell | LoopWaiter
_W = TypeVar("_W", bound=Waiter)


class Wakeups:
    """The readers to wake after a step: threads one by one, and each event loop once for all its streams."""

    def __init__(self) -> None:
        self._in_loops: dict[asyncio.AbstractEventLoop, list[LoopWaiter]] = {}

    def add(self, waiter: Waiter) -> None:
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
        self._waiting: list[Waiter] = []  # for any delta
        self._waiting_for_end: list[Waiter] = []

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

    def result(self, waiter: Waiter) -> GenerationOutput | None:
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

    def forget(self, waiter: Waiter) -> None:
        """Forget ``waiter``, which no longer waits for the end."""
        with self._lock, suppress(ValueError):
            self._waiting_for_end.remove(waiter)


class EndOfStream(Exception):
    """All deltas have been read."""


def _wake_all(waiters: Sequence[LoopWaiter]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
