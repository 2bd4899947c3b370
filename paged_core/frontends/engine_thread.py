"""EngineThread: the only thread that touches an engine, and its command queue. It knows neither requests nor text.

In each round the thread carries out queued commands, in their order, and computes one step. Its ThreadPolicy says what
a step is. The thread lives as long as it has a holder.

Other threads put commands into one queue without ever waiting, so that a destructor may do so at any point, even inside
this thread. They hold no lock that this thread needs to go on.
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
from paged_core.frontends.channel import Bell
from paged_core.frontends.locks import PatientLock, StuckError
from paged_core.frontends.thread_policy import ThreadPolicy
from paged_core.frontends.work_item import WorkItem

_T = TypeVar("_T")
_COMMANDS_S = 0.01  # for commands between two steps; a command that has begun is finished
_MAX_CALLS = 1024  # calls waiting for their turn
_RECHECK_S = 1.0  # how long a waiter sleeps whose bell the ended thread never rang


class EngineThread:
    """Use it as ``with thread.lock(): thread.hold(me); thread.post(command)``, and at the end ``thread.leave(me,
    last_command)``.

    Args:
        name: the thread's name.
        policy: the owner. Only the running thread keeps it alive.
    """

    def __init__(self, name: str, policy: ThreadPolicy) -> None:
        self._name = name
        self._policy = weakref.ref(policy)
        self._calls: weakref.WeakSet[WorkItem[Any]] = weakref.WeakSet()  # those that somebody may still read
        self._start_afresh()
        _THREADS.add(self)

    def _start_afresh(self) -> None:
        self._lock = PatientLock()  # guards _thread and holders
        self._thread: threading.Thread | None = None
        self.holders: set[Any] = set()
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()  # put() is safe even in __del__
        self._waiting: set[WorkItem[Any]] = set()
        self._bells: list[Bell] = []  # of those who wait for the thread's end
        self._began: float | None = None  # when its present step or command began; None: it is idle

    # ---- for all threads -----------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._thread is not None

    @property
    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    @property
    def num_commands(self) -> int:
        """The number of commands waiting to be carried out."""
        return self._commands.qsize()

    @property
    def busy_s(self) -> float:
        """The seconds spent on the present step or command; 0 while it is idle."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def check_may_wait(self) -> None:
        """
        Raises:
            ReentryError: this is called in the thread itself, which would wait for itself.
        """
        if self.is_current:
            raise ReentryError(
                "the engine's own thread (in a logits processor or an observer, say) can't wait for what only it can "
                "bring about; wait in another thread"
            )

    def lock(self) -> threading.Lock:
        """Return the lock for a ``with`` block, inside which the thread neither starts nor ends. Hold it for moments
        only.

        Raises:
            StuckError: the lock is never released.
        """
        return self._lock.bare()

    def hold(self, holder: Any) -> None:
        """Keep the thread alive until ``holder`` leaves. Called under the lock.

        Raises:
            RuntimeError: the thread can't be started (too many threads, or the interpreter is shutting down).
        """
        # is_alive() may be wrong after an exception has struck it or join().
        if self._thread is None:
            thread = threading.Thread(target=self._run, args=(self._policy(),), name=self._name, daemon=True)
            thread.start()  # it waits for our lock, and ends if an interrupt comes before the next line
            self._thread = thread
        self.holders.add(holder)

    def post(self, command: Callable[[], object]) -> None:
        """Queue ``command`` to be carried out between two steps."""
        self._commands.put(command)

    def call(self, function: Callable[[], _T]) -> WorkItem[_T]:
        """Queue ``function``, and return a WorkItem for its result. Called under the lock.

        Raises:
            EngineBusyError: too many calls are waiting.
        """
        if len(self._waiting) >= _MAX_CALLS:
            raise EngineBusyError(f"{_MAX_CALLS} looks at the engine wait, the limit; try again soon")
        item = WorkItem(function, self.check_may_wait)
        self._calls.add(item)
        self._waiting.add(item)
        self.post(lambda: self._run_item(item))
        return item

    def leave(self, holder: Any, last: Callable[[], object]) -> None:
        """Carry out one last command for ``holder``, which then needs the thread no more. It may leave twice. If there
        is no thread, the command is carried out here."""
        if self._thread is None:
            self._see_off(holder, last)
        else:
            self.post(lambda: self._see_off(holder, last))
            self.holders.discard(holder)  # if two leave at once, at least one then waits for the thread's end

    def wait_until_free(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended or has a holder. Returns False if neither happens in ``timeout`` seconds."""
        thread = self._thread
        if thread is None or self.is_current:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            bell = Bell()
            self._bells.append(bell)  # before the checks, so that it rings for whatever happens after them
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
        """Wait for a command and carry it out. Returns False if none comes in ``wait_s`` seconds (None: wait for
        ever)."""
        self._began = None
        try:
            # Python 3.10 may wait for ever with a timeout of 0.
            command = self._commands.get(wait_s != 0, wait_s)
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
        except StuckError as error:  # no request can begin any more; waiting commands are carried out without the lock
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
        """Carry out waiting commands as far as time allows, or all of them if nobody needs a step."""
        until = time.monotonic() + _COMMANDS_S
        while not self._commands.empty() and (not self.holders or time.monotonic() < until):
            self.carry_out_next(0)

    def _end(self) -> bool:
        """End the thread if it has nothing to do. Returns whether it ends."""
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
        """Call ``work``. Returns True if it returns True, False if it raises."""
        self._began = time.monotonic()
        try:
            return work() is True
        except BaseException as error:  # of any kind: somebody waits for the result
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
        """Called in a forked child. Makes anew whatever other threads may have held or left half done."""
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
