"""JobThread: a thread that does jobs one after another, and lives only while there are any."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

_log = logging.getLogger("paged_core")
_IDLE_S = 2.0  # without a job, the thread ends, so that nobody need stop it


class JobThread:
    """A thread of this ``name`` that starts with the first job."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: end
        self._lock = threading.Lock()  # guards the thread object
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Do ``job`` soon in the thread, or at once if the process is ending and can't start threads. Exceptions are
        logged."""
        with self._lock:
            self._jobs.put(job)
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._jobs.put(None)
            else:
                self._thread = thread
                return
        self._run()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all jobs given before are done. Returns False if that takes longer."""
        if self._thread is None:
            return True
        done = threading.Event()
        self.do(done.set)
        return done.wait(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the thread once the jobs that were given are done. Waits no longer than ``timeout_s``."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.put(None)
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                _log.exception("%s failed", self._name)
            del job  # it may hold much memory

    def _next(self) -> Callable[[], None] | None:
        try:
            return self._jobs.get(timeout=_IDLE_S)
        except Empty:
            with self._lock:
                if not self._jobs.empty():
                    return self._jobs.get()
                self._thread = None
                return None
