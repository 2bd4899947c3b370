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
from contextlib import contextmanager, suppress
from typing import Any

from paged_core import Engine, EngineConfig, EngineDeadError, Request, release_helper_threads
from paged_hf.generate.calls import Call, NotStarted
from paged_hf.generate.changes import Changes, StuckError
from paged_hf.model.paged_model import HFPagedModel

_PATIENCE = 0.25  # of a step's time: how long the next step waits for callers that are choosing their tokens
_LOOK_S = 5.0  # how often the thread looks for calls that were left behind, while it has nothing else to do
_STUCK_S = 0.25  # how long those may keep all blocks from others before they have to give way


class EngineHost:
    """Runs the calls of many threads on one engine, which is built when the first one comes."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self._model = model
        self._config = config
        self._numbers = itertools.count()
        self._here = threading.local()  # .caller: who calls in this thread
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
        # Between the beginning and the end of a generate() call; a forked child is inside the one that has forked.
        self._callers: set[object] = {caller for caller in [getattr(self._here, "caller", None)] if caller is not None}
        self._changes = Changes()  # guards all below
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: set[Call] = set()
        self._choosing: set[Call] = set()  # have logits, and are about to bring tokens
        self._exiting = False
        self._thread: threading.Thread | None = None

    @property
    def num_open(self) -> int:
        """Calls under way."""
        return len(self._open)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """Around whatever a caller's thread does for one generate() call."""
        if self._exiting and threading.current_thread().daemon:
            raise SystemExit("the interpreter is shutting down")
        caller, before = object(), getattr(self._here, "caller", None)
        try:
            self._callers.add(caller)
            self._here.caller = caller
            yield
        finally:
            self._callers.discard(caller)
            self._here.caller = before

    def open(self, call: Call) -> None:
        """Add the call's rows to the running batch. ``call.wait`` raises what stands in the way.

        Raises:
            NotStarted: no thread can be started; or the engine's own would wait for itself.
        """
        if self._thread is threading.current_thread():
            raise NotStarted("generate() was called by the model, inside a step of its own engine")
        release_helper_threads()  # this thread waits from now on; the engine's computes
        call.caller = getattr(self._here, "caller", None)
        try:
            self._add(call)
        except StuckError as error:
            raise NotStarted(str(error)) from error

    def _add(self, call: Call) -> None:
        with self._changes.lock():
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
            except BaseException as error:  # whatever it is, the call waits for an answer
                call.tell(error)

        with self._changes.lock():
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
        try:
            with self._changes.lock():
                if call in self._open:
                    self._leave(call)
                thread = self._thread
            if thread is None:
                return
            self._changes.wait_for(lambda: self._thread is not thread or bool(self._open) or not thread.is_alive())
        except StuckError:
            return  # which has been told where it matters
        if self._thread is not thread:
            thread.join()

    def _leave(self, call: Call) -> None:
        """Under the lock."""
        self._post(lambda: self._end(call))
        self._choosing.discard(call)
        self._open.discard(call)

    def release(self) -> bool:
        """Give back the K/V memory. False: calls are under way, and nothing was done."""
        with self._changes.lock():
            return self._thread is None and (self.engine is None or self.engine.release_memory())

    def drop(self) -> None:
        """Forget the engine, and all that was made for the model, unless calls are under way."""
        with self._changes.lock():
            if self._thread is None:
                self.engine = None

    def shut_down(self) -> None:
        """At the interpreter's exit, when only daemon threads are left: end their calls, and wait for the thread's end.

        SystemExit ends such a thread without a word, as the interpreter itself will in a moment.
        """
        self._exiting = True
        thread = self._thread
        with suppress(StuckError):
            with self._changes.lock():
                for call in self._open:
                    call.tell(SystemExit("the interpreter is shutting down"))
                    self._post(lambda call=call: self._end(call))  # type: ignore[misc]
            # A thread that is inside torch when the interpreter goes takes the process down with it.
            deadline = time.monotonic() + 1
            while self._callers and time.monotonic() < deadline:
                time.sleep(0.002)
            with self._changes.lock():
                self._open.clear()
                self._changes.tell()
        if thread is not None:
            thread.join(timeout=10)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._changes.tell()

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def handed(self, call: Call) -> None:
        """The call has its logits: its tokens will come soon."""
        with self._changes.lock():
            self._choosing.add(call)

    def _run(self) -> None:
        try:
            with self._changes.lock():
                if self._thread is not threading.current_thread():
                    return
            self._work()
        except StuckError as error:  # nothing can be handed over any more, and what follows goes without the lock
            self._fail_all(error)
            self._inbox.clear()
            self._open.clear()
            self._thread = None

    def _work(self) -> None:
        worked, going_on = False, True
        while going_on:
            try:
                going_on = self._obey(wait=not worked)
                worked = going_on and self._step()
            except StuckError:
                raise
            except BaseException as error:  # whatever it is, somebody waits for an answer
                self._fail_all(error)
                worked = False

    def _obey(self, wait: bool) -> bool:
        """Carry out what was asked for meanwhile. False: nothing is open any more; the thread is to end."""
        while True:
            if wait and not self._wait_for_commands():
                return True
            with self._changes.lock():
                if not self._inbox:
                    if self._open:
                        return True
                    self._thread = None
                    self._changes.tell()
                    return False
                command = self._inbox.popleft()
            command()
            wait = False

    def _wait_for_commands(self) -> bool:
        """Until there is one, or nothing is open any more. False: none came while some calls keep all blocks from the
        others; they have given way."""
        stuck = self.engine is not None and self.engine.has_work
        while not self._changes.wait_for(lambda: bool(self._inbox) or not self._open, _STUCK_S if stuck else _LOOK_S):
            if stuck and self.engine is not None:
                self.engine.preempt_held()
                return False
            self._end_the_left_behind()
        return True

    def _end_the_left_behind(self) -> None:
        """Calls whose caller is gone: an exception struck it where it was about to close them."""
        with self._changes.lock():
            for call in [call for call in self._open if call.caller is not None and call.caller not in self._callers]:
                self._leave(call)

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
        self._changes.wait_for(lambda: not self._choosing, _PATIENCE * stats.duration_s)
        with self._changes.lock():
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
        except BaseException as error:  # whatever it is, the call waits for an answer
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
        for call in list(self._open):
            if isinstance(error, StuckError) or call.engine is failed:
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
