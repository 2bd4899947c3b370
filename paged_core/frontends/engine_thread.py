"""EngineThread: the one thread that touches an engine, and how others reach it. It knows neither requests nor text.

Round after round the thread carries out what others have asked for meanwhile (commands, in their order), and computes
one step. Its ThreadPolicy says what that means. The thread lives as long as somebody holds it.

Others put commands into one queue, which never makes them wait: a destructor may do so too, in the middle of whatever
its thread was at. They hold no lock that this thread needs in order to go on.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from paged_core.errors import EngineBusyError, EngineDeadError, ReentryError
from paged_core.frontends.locks import PatientLock, StuckError
from paged_core.frontends.stream import Bell
from paged_core.frontends.thread_policy import ThreadPolicy
from paged_core.frontends.work_item import WorkItem

_T = TypeVar("_T")
_COMMANDS_S = 0.01  # for commands between two steps; what has begun is finished
_MAX_CALLS = 1024  # that wait
_RECHECK_S = 1.0  # how long somebody sleeps whose bell was lost with the thread that was to ring it


class EngineThread:
    """``with thread.lock(): thread.hold(me); thread.post(command)``; in the end ``thread.leave(me, last_command)``.

    Args:
        name: the thread's.
        policy: the owner. It isn't kept alive from here but while the thread runs.
    """

    def __init__(self, name: str, policy: ThreadPolicy) -> None:
        self._name = name
        self._policy = weakref.ref(policy)
        self._calls: weakref.WeakSet[WorkItem[Any]] = weakref.WeakSet()  # those somebody may still read
        self._start_afresh()
        _THREADS.add(self)

    def _start_afresh(self) -> None:
        self._lock = PatientLock()  # guards the two below
        self._thread: threading.Thread | None = None
        self.holders: set[Any] = set()
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()  # put() is safe even in __del__
        self._waiting: set[WorkItem[Any]] = set()
        self._bells: list[Bell] = []  # of those who wait for its end
        self._began: float | None = None  # when it took up what it is at; None: it waits for something to do

    # ---- for all threads -----------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._thread is not None

    @property
    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    @property
    def num_commands(self) -> int:
        """How many wait to be carried out."""
        return self._commands.qsize()

    @property
    def busy_s(self) -> float:
        """How long it has been at its present step or command; 0 while it has nothing to do."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def check_may_wait(self) -> None:
        """
        Raises:
            ReentryError: this is the thread itself.
        """
        if self.is_current:
            raise ReentryError(
                "the engine's own thread (in a logits processor or an observer, say) can't wait for what only it can "
                "bring about; wait in another thread"
            )

    def lock(self) -> threading.Lock:
        """For a ``with``: inside, the thread neither begins nor ends. To be held for moments only.

        Raises:
            StuckError: nobody gives it back.
        """
        return self._lock.bare()

    def hold(self, holder: Any) -> None:
        """Under the lock: the thread is to live until ``holder`` leaves.

        Raises:
            RuntimeError: it can't be started (too many threads, or the interpreter is shutting down).
        """
        if self._thread is None:  # is_alive() lies once an exception has struck somebody who asked it or join()
            thread = threading.Thread(target=self._run, args=(self._policy(),), name=self._name, daemon=True)
            thread.start()  # it waits for our lock, and ends if an interrupt keeps us from the next line
            self._thread = thread
        self.holders.add(holder)

    def post(self, command: Callable[[], object]) -> None:
        """Have ``command`` carried out between two steps."""
        self._commands.put(command)

    def call(self, function: Callable[[], _T]) -> WorkItem[_T]:
        """As ``post``, for what ``function`` returns or raises. Under the lock.

        Raises:
            EngineBusyError: very many wait already.
        """
        if len(self._waiting) >= _MAX_CALLS:
            raise EngineBusyError(f"{_MAX_CALLS} looks at the engine wait, the limit; try again soon")
        item = WorkItem(function, self.check_may_wait)
        self._calls.add(item)
        self._waiting.add(item)
        self.post(lambda: self._run_item(item))
        return item

    def leave(self, holder: Any, last: Callable[[], object]) -> None:
        """``holder`` needs the thread for one last command, and then no more. It may say so twice. Where there is no
        thread, the command is carried out here."""
        if self._thread is None:
            self._see_off(holder, last)
        else:
            self.post(lambda: self._see_off(holder, last))
            self.holders.discard(holder)  # so that of two who leave at once, one at least waits until it is free

    def wait_until_free(self, timeout: float | None = None) -> bool:
        """Until it has ended, or somebody holds it. False: neither happened in ``timeout`` seconds."""
        thread = self._thread
        if thread is None or self.is_current:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            bell = Bell()
            self._bells.append(bell)  # before we look, so that what happens later rings
            if self.holders:
                return True
            if self._thread is not thread:
                thread.join()
                return True
            left = _RECHECK_S if deadline is None else min(deadline - time.monotonic(), _RECHECK_S)
            if left <= 0:
                return False
            bell.wait(left)

    # ---- in the thread -------------------------------------------------------------------------------------------

    def carry_out_next(self, wait_s: float | None) -> bool:
        """Wait for a command, and carry it out. False: none came in ``wait_s`` seconds (None: one will come)."""
        self._began = None
        try:
            command = self._commands.get(wait_s != 0, wait_s)  # Python 3.10 may wait for ever with a timeout of 0
        except Empty:
            return False
        self._guarded(command)
        return True

    def _run(self, policy: ThreadPolicy) -> None:
        try:
            with self.lock():
                if not self.is_current:
                    return
            self._go_round(policy)
        except StuckError as error:  # nothing can be begun any more, and what waits ends without the lock
            self.holders.clear()
            policy.failed(error)
            self._carry_out_waiting()
        finally:
            self._began = None
            if self.is_current:
                self._thread = None

    def _go_round(self, policy: ThreadPolicy) -> None:
        worked = False
        while True:
            if not worked and not self.carry_out_next(policy.idle_s):
                self._guarded(policy.idle)
            self._carry_out_waiting()
            ended = not self.holders and self._end()
            self._ring()
            if ended:
                return
            worked = self._guarded(policy.step)

    def _carry_out_waiting(self) -> None:
        """As far as there is time; all, if nobody waits for a step."""
        until = time.monotonic() + _COMMANDS_S
        while not self._commands.empty() and (not self.holders or time.monotonic() < until):
            self.carry_out_next(0)

    def _end(self) -> bool:
        """False: there is more to do."""
        with self.lock():
            if self.holders or not self._commands.empty():
                return False
            self._thread = None
            return True

    def _ring(self) -> None:
        with suppress(IndexError):  # this thread has ended, and the next one may be ringing already
            while True:
                self._bells.pop().ring()

    def _guarded(self, work: Callable[[], object]) -> bool:
        """Whether it answers True; no, if it raises."""
        self._began = time.monotonic()
        try:
            return work() is True
        except BaseException as error:  # whatever it is, somebody waits for an answer
            policy = self._policy()
            assert policy is not None, "it lives while its thread runs"
            policy.failed(error)
            return False

    def _see_off(self, holder: Any, last: Callable[[], object]) -> None:
        self.holders.discard(holder)
        last()

    def _run_item(self, item: WorkItem[Any]) -> None:
        self._waiting.discard(item)
        item.run()

    # ---- the process ---------------------------------------------------------------------------------------------

    def _forked(self) -> None:
        """In the child, right after the fork. Whatever other threads held or had half done is made anew."""
        holders, ran = self.holders, self.running
        self._start_afresh()
        for item in list(self._calls):
            item.forked(EngineDeadError("the process was forked; build an engine in the child"))
        policy = self._policy()
        if policy is not None:
            policy.forked(holders, ran)


_THREADS: weakref.WeakSet[EngineThread] = weakref.WeakSet()


def _after_fork() -> None:
    for thread in list(_THREADS):
        thread._forked()


@atexit.register
def _at_exit() -> None:
    for policy in [thread._policy() for thread in list(_THREADS)]:
        if policy is not None:
            with suppress(StuckError):
                policy.shut_down()


os.register_at_fork(after_in_child=_after_fork)
