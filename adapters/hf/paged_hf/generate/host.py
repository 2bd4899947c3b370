"""EngineHost: the engine of one patched model, and what its thread does for the generate() calls that are open.

Callers wait in their own threads. Their processors, criteria and streamers run there too, so that an exception reaches
only that caller. The engine's thread belongs to no caller and lives only while calls are open: Ctrl-C in a caller never
interrupts a step.

This file knows engines and calls. It knows nothing of generate().
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from paged_core import (
    Engine,
    EngineConfig,
    EngineDeadError,
    EngineThread,
    Request,
    ThreadPolicy,
    release_helper_threads,
)
from paged_hf.generate.calls import EngineCall, NotStarted
from paged_hf.model.paged_model import HFPagedModel

_PATIENCE = 0.25  # of a step's time: how long the next step waits for callers that are choosing their tokens
_LOOK_S = 5.0  # how often the idle thread looks for abandoned calls
_STUCK_S = 0.25  # how long choosing callers may hold all blocks before they are preempted


class EngineHost(ThreadPolicy):
    """Runs the calls of many threads on one engine, which is built when the first one comes."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self._model = model
        self.config = config
        self._numbers = itertools.count()
        self._here = threading.local()  # .caller: the open call of this thread
        self._start_afresh()
        self.thread = EngineThread("paged-generate", self)  # its holders: the open calls

    def _start_afresh(self) -> None:
        # Callers between the beginning and the end of a generate() call; in a forked child, the call that forked.
        self._callers: set[object] = {caller for caller in [getattr(self._here, "caller", None)] if caller is not None}
        self._exiting = False
        # The thread's own while it runs:
        self.engine: Engine | None = None
        self._owners: dict[Request, EngineCall] = {}
        self._choosing: set[EngineCall] = set()  # have logits, and are choosing tokens

    # ---- callers -------------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Calls under way."""
        return len(self.thread.holders)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """Encloses everything that a caller's thread does for one generate() call."""
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

    def open(self, call: EngineCall) -> None:
        """Add the call's rows to the running batch. If that fails, ``call.wait`` raises.

        Raises:
            NotStarted: no thread can be started; or the engine's thread would wait for itself.
        """
        if self.thread.is_current:
            raise NotStarted("generate() was called by the model, inside a step of its own engine")
        release_helper_threads()  # from now on this thread waits, and the engine's thread computes
        call.caller = getattr(self._here, "caller", None)
        try:
            with self.thread.lock():
                self.thread.hold(call)
                self.thread.post(partial(self._admit, call))
        except (RuntimeError, EngineDeadError) as error:  # too many threads; or a lock is never released
            raise NotStarted(f"the engine has no thread: {error}") from error

    def post(self, call: EngineCall, command: Callable[[Engine], None]) -> None:
        """Run ``command`` between two steps. ``call.wait`` raises its exceptions."""

        def run() -> None:
            self._choosing.discard(call)
            try:
                if call.engine is not None and call.engine is self.engine:  # else the engine has failed
                    command(self.engine)
            except BaseException as error:  # whatever it is, the call waits for an answer
                call.tell(error)

        self.thread.post(run)

    def close(self, call: EngineCall) -> None:
        """Cancel what still runs of a call. If no other one is open, the thread has ended on return."""
        try:
            self._close(call)
        except BaseException:  # an interrupt: do now what it has prevented
            self._close(call)
            raise

    def _close(self, call: EngineCall) -> None:
        self.thread.leave(call, partial(self._end, call))
        self.thread.wait_until_free()

    def release(self) -> bool:
        """Give back the K/V memory. False: calls are under way, and nothing was done."""
        with self.thread.lock():
            return not self.thread.running and (self.engine is None or self.engine.release_memory())

    def drop(self) -> None:
        """Drop the engine, and everything made for the model, unless calls are open."""
        with self.thread.lock():
            if not self.thread.running:
                self.engine = None

    # ---- in the engine's thread ----------------------------------------------------------------------------------

    def handed(self, call: EngineCall) -> None:
        """The call has its logits, and will soon bring its tokens."""
        self._choosing.add(call)

    def step(self) -> bool:
        """One step, then a short wait for the callers that got logits. False: there was nothing to compute."""
        engine = self.engine
        if engine is None or not engine.has_work:
            return False
        before = engine.last_stats
        for output in engine.step():
            self._owners[output.request].take(output)
        stats = engine.last_stats
        if stats is None or stats is before:
            return False  # rows that could run lack blocks, and the rows that hold them are waiting for tokens
        until = time.monotonic() + _PATIENCE * stats.duration_s
        while self._choosing and (left := until - time.monotonic()) > 0:
            self.thread.carry_out_next(left)
        self._choosing.clear()  # slower callers join a later step
        return True

    @property
    def idle_s(self) -> float:
        return _STUCK_S if self.engine is not None and self.engine.has_work else _LOOK_S

    def idle(self) -> None:
        if self.engine is not None and self.engine.has_work:  # some calls keep all blocks from the others
            self.engine.preempt_held()
        for call in list(self.thread.holders):  # its caller may be gone, by an exception just before it closed the call
            if call.caller is not None and call.caller not in self._callers:
                self.thread.leave(call, partial(self._end, call))

    def failed(self, error: BaseException) -> None:
        """The engine has failed, and with it the calls that have rows there."""
        self.engine = None
        for call in set(self._owners.values()):
            call.tell(error)
        self._owners.clear()

    def _admit(self, call: EngineCall) -> None:
        try:
            if call not in self.thread.holders:
                raise NotStarted("the engine's thread has ended")
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

    def _enter(self, call: EngineCall) -> None:
        assert self.engine is not None
        call.engine = self.engine  # also if it fails halfway: leave() is called
        call.rows = call.enter(self.engine, str(next(self._numbers)))
        for row in call.rows:
            self._owners[row] = call

    def _build(self) -> Engine:
        self.paged_model = HFPagedModel(self._model)
        return Engine(self.paged_model, self.config)

    def _end(self, call: EngineCall) -> None:
        self._choosing.discard(call)
        if call.engine is None or call.engine is not self.engine:
            return  # it never entered, or its engine has failed
        for row in call.rows:
            self._owners.pop(row, None)
            self.engine.stop(row)
        call.leave()
        call.engine = None  # it may be ended twice

    # ---- the process ---------------------------------------------------------------------------------------------

    def forked(self, holders: set[Any], ran: bool) -> None:
        self._start_afresh()
        for call in holders:
            call.tell(
                EngineDeadError("the process was forked in the middle of this call: only the parent goes on with it")
            )

    def shut_down(self) -> None:
        """Only daemon threads are left. SystemExit ends them silently, as the interpreter itself will soon."""
        self._exiting = True
        deadline = time.monotonic() + 1
        while True:
            for call in list(self.thread.holders):
                call.tell(SystemExit("the interpreter is shutting down"))
                self.thread.leave(call, partial(self._end, call))
            if not self._callers or time.monotonic() > deadline:
                break
            time.sleep(0.002)
        self.thread.wait_until_free(10)
