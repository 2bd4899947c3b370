"""EngineHost: the engine of one patched model, and the thread that steps it while, and only while, calls are open.

Callers wait in their own threads. What is theirs (processors, criteria, streamers) runs there too, so that what it
raises reaches nobody else. The engine's thread is nobody's own: Ctrl-C in a caller never interrupts a step.

This file knows engines and threads. It knows nothing of generate().
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from paged_core import Engine, EngineConfig, EngineDeadError, Request, release_helper_threads
from paged_hf.generate.calls import Call, NotStarted
from paged_hf.model.paged_model import HFPagedModel

_PATIENCE = 0.25  # of a step's time: how long the next step waits for callers that are choosing their tokens
_STUCK_S = 0.25  # how long those may keep all blocks from others before they have to give way


class EngineHost:
    """Runs the calls of many threads on one engine, which is built when the first one comes."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self._model = model
        self._config = config
        self._numbers = itertools.count()
        self._start_afresh()
        _HOSTS.add(self)

    def forked(self) -> None:
        """In the child, which has neither the thread nor the other callers."""
        unfinished = self._open
        self._start_afresh()
        for call in unfinished:
            call.tell(
                EngineDeadError("the process was forked in the middle of this call: only the parent goes on with it")
            )

    def _start_afresh(self) -> None:
        self.engine: Engine | None = None  # the thread's own while it runs
        self._owners: dict[Request, Call] = {}  # the thread's own
        self._changed = threading.Condition()  # guards all below
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: set[Call] = set()
        self._choosing: set[Call] = set()  # have logits, and are about to bring tokens
        self._num_callers = 0
        self._exiting = False
        self._thread: threading.Thread | None = None

    @property
    def num_open(self) -> int:
        """Calls under way."""
        return len(self._open)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """Around whatever a caller's thread does for one generate() call."""
        with self._changed:
            if self._exiting and threading.current_thread().daemon:
                raise SystemExit("the interpreter is shutting down")
            self._num_callers += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_callers = max(0, self._num_callers - 1)  # a forked child began with none
                self._changed.notify_all()

    def open(self, call: Call) -> None:
        """Add the call's rows to the running batch. ``call.wait`` raises what stands in the way.

        Raises:
            NotStarted: no thread can be started.
        """
        release_helper_threads()  # this thread waits from now on; the engine's computes
        with self._changed:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="paged-generate", daemon=True)
                try:
                    thread.start()  # it waits for our lock, and ends if an interrupt keeps us from the next line
                except RuntimeError as error:  # too many threads, or the interpreter is shutting down
                    raise NotStarted(f"the engine has no thread: {error}") from error
                self._thread = thread
            self._open.add(call)
            self._post(lambda: self._admit(call))

    def post(self, call: Call, command: Callable[[Engine], None]) -> None:
        """Have ``command`` run between two steps. ``call.wait`` raises what it raises."""

        def run() -> None:
            try:
                if call.engine is not None and call.engine is self.engine:  # else it has failed, and the call was told
                    command(self.engine)
            except Exception as error:
                call.tell(error)

        with self._changed:
            self._choosing.discard(call)
            if call in self._open:  # else it was told why not
                self._post(run)

    def close(self, call: Call) -> None:
        """Cancel what still runs of a call. If no other one is open, the thread has ended on return."""
        try:
            self._close(call)
        except BaseException:  # an interrupt: whatever it has kept from being done is done now
            self._close(call)
            raise

    def _close(self, call: Call) -> None:
        with self._changed:
            if call in self._open:
                self._post(lambda: self._end(call))
                self._choosing.discard(call)
                self._open.discard(call)
            thread = self._thread
            if thread is None:
                return
            self._changed.wait_for(lambda: self._thread is not thread or bool(self._open))
            ended = self._thread is not thread
        if ended:
            thread.join()

    def release(self) -> bool:
        """Give back the K/V memory. False: calls are under way, and nothing was done."""
        with self._changed:
            return self._thread is None and (self.engine is None or self.engine.release_memory())

    def drop(self) -> None:
        """Forget the engine, and all that was made for the model, unless calls are under way."""
        with self._changed:
            if self._thread is None:
                self.engine = None

    def shut_down(self) -> None:
        """At the interpreter's exit, when only daemon threads are left: end their calls, and wait for the thread's end.

        SystemExit ends such a thread without a word, as the interpreter itself will in a moment.
        """
        with self._changed:
            self._exiting = True
            thread = self._thread
            for call in self._open:
                call.tell(SystemExit("the interpreter is shutting down"))
                self._post(lambda call=call: self._end(call))  # type: ignore[misc]
            # A thread that is inside torch when the interpreter goes takes the process down with it.
            self._changed.wait_for(lambda: not self._num_callers, timeout=1)
            self._open.clear()
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout=10)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._changed.notify_all()

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def handed(self, call: Call) -> None:
        """The call has its logits: its tokens will come soon."""
        with self._changed:
            self._choosing.add(call)

    def _run(self) -> None:
        with self._changed:
            if self._thread is not threading.current_thread():
                return
        worked, going_on = False, True
        while going_on:
            try:
                going_on = self._obey(wait=not worked)
                worked = going_on and self._step()
            except BaseException as error:  # whatever it is, somebody waits for an answer
                self._fail_all(error)
                worked = False

    def _obey(self, wait: bool) -> bool:
        """Carry out what was asked for meanwhile. False: nothing is open any more; the thread is to end."""
        while True:
            with self._changed:
                while wait and self._open and not self._inbox:
                    stuck = self.engine is not None and self.engine.has_work
                    if not self._changed.wait(_STUCK_S if stuck else None) and self.engine is not None:
                        self.engine.preempt_held()
                        return True
                if not self._inbox:
                    if self._open:
                        return True
                    self._thread = None
                    self._changed.notify_all()
                    return False
                command = self._inbox.popleft()
            command()
            wait = False

    def _step(self) -> bool:
        """One step, then a moment's patience for those who were handed logits. False: there was nothing to compute."""
        engine = self.engine
        if engine is None or not engine.has_work:
            return False
        before = engine.last_stats
        for output in engine.step():
            self._owners[output.request].take(output)
        stats = engine.last_stats
        if stats is None or stats is before:
            return False  # whoever could run lacks blocks, and those who have them are choosing
        deadline = time.perf_counter() + _PATIENCE * stats.duration_s
        with self._changed:
            while self._choosing and (left := deadline - time.perf_counter()) > 0:
                self._changed.wait(left)
            self._choosing.clear()  # who is slower than that joins a later step
        return True

    def _admit(self, call: Call) -> None:
        try:
            if self.engine is None:
                self.engine = self._build()
            if call.padded and self.paged_model.counts_padding:
                raise NotStarted("the model counts padding as positions")
            try:
                self._enter(call)
            except EngineDeadError as error:  # the model has another dtype, device or vocabulary now
                if self._owners:
                    raise NotStarted(str(error)) from None  # others have rows there
                self.engine = self._build()
                self._enter(call)
        except Exception as error:
            call.tell(error)

    def _enter(self, call: Call) -> None:
        assert self.engine is not None
        call.engine = self.engine  # also if it fails halfway: leave() is called
        call.rows = call.enter(self.engine, str(next(self._numbers)))
        for row in call.rows:
            self._owners[row] = call

    def _build(self) -> Engine:
        self.paged_model = HFPagedModel(self._model)
        return Engine(self.paged_model, self._config)

    def _end(self, call: Call) -> None:
        if call.engine is None or call.engine is not self.engine:
            return  # it never entered, or went down with an engine that is no more
        for row in call.rows:
            self._owners.pop(row, None)
            self.engine.stop(row)
        call.leave()

    def _fail_all(self, error: BaseException) -> None:
        """The engine is lost, and with it the calls that have rows there."""
        failed, self.engine = self.engine, None
        self._owners.clear()
        with self._changed:
            for call in self._open:
                if call.engine is failed:
                    call.tell(error)


_HOSTS: weakref.WeakSet[EngineHost] = weakref.WeakSet()


def _after_fork() -> None:
    for host in list(_HOSTS):
        host.forked()


def _at_exit() -> None:
    for host in list(_HOSTS):
        host.shut_down()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
