"""Calls with a time limit: a helper thread makes them, and is abandoned when they take too long."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")
_LOOK_S = 0.01  # between two looks at how long it takes
_LEFT_NICE = 19  # of an abandoned thread: it runs only when nothing else does


class TooSlow(Exception):
    """It was left behind."""


class BoundedThread:
    """Makes calls one after another. Belongs to one thread.

    ``limit_s``: most processor time of a call (independent of the machine's load), or wall time if the system does not
    report processor time. The called function should let other threads run.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._helper: _Helper | None = None

    def call(self, function: Callable[[], _T]) -> _T:
        """``function()``, or what it raises.

        Raises:
            TooSlow: the call still runs; a new thread makes the next calls.
        """
        if self._helper is None:
            self._helper = _Helper()
        helper, job = self._helper, _Job(function)
        began_s = helper.busy_s()
        helper.jobs.put(job)
        while not job.done.acquire(timeout=_LOOK_S):
            if helper.busy_s() - began_s > self._limit_s:
                self._helper = None
                helper.leave()
                raise TooSlow
        if job.error is not None:
            raise job.error
        result: _T = job.result
        return result

    def __del__(self) -> None:
        if self._helper is not None:
            self._helper.jobs.put(None)


class _Job:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error
        self.done.release()


class _Helper:
    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self.jobs,), name="paged-grammar", daemon=True)
        self._thread.start()

    def busy_s(self) -> float:
        """Processor time that it has taken so far."""
        clock = getattr(time, "pthread_getcpuclockid", None)
        assert self._thread.ident is not None, "it was started"
        return time.monotonic() if clock is None else time.clock_gettime(clock(self._thread.ident))

    def leave(self) -> None:
        """Abandon the thread: it continues at the lowest priority, and ends."""
        self.jobs.put(None)
        if hasattr(os, "setpriority") and self._thread.native_id is not None:
            with suppress(OSError):  # Linux has priorities of threads
                os.setpriority(os.PRIO_PROCESS, self._thread.native_id, _LEFT_NICE)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # it may refer to objects that must not live as long as this thread
