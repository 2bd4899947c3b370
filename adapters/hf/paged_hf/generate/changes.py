"""Changes: a lock, and waiting for what others change under it, which no exception from outside can leave locked.

An exception may strike a thread anywhere: Ctrl-C, or one that another thread sends it (libraries that limit time do).
``threading.Condition`` is Python code: one that strikes after its lock was taken, and before the ``with`` block has
begun, leaves it locked for ever. A bare lock is entered and left by the interpreter itself, where nothing strikes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from paged_core import EngineDeadError

_PATIENCE_S = 20.0  # the lock is held for moments only: whoever waits for it longer waits for ever
_RECHECK_S = 1.0  # how long a thread sleeps whose bell was lost with the thread that was to ring it
_NUM_YIELDS = 100


class StuckError(EngineDeadError):
    """The lock will not be given back any more."""


class Changes:
    """``with changes.lock(): ...; changes.tell()`` here, ``changes.wait_for(ready)`` there."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._lock = threading.Lock()
        self._bells: list[threading.Lock] = []  # of those who wait; rung by being released
        self._patience_s = patience_s
        self._stuck = False

    def lock(self) -> threading.Lock:
        """The lock, for a ``with`` of the caller's own. Whoever holds it must not ask for it again.

        Raises:
            StuckError: nobody gives it back.
        """
        if self._lock.locked():
            self._wait_until_free()
        self._stuck = False
        return self._lock

    def tell(self) -> None:
        """Something has changed. To be called under the lock."""
        while self._bells:
            bell = self._bells[-1]
            if bell.locked():  # else an interrupt kept who rang it from the next line
                bell.release()
            del self._bells[-1]

    def wait_for(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Sleep until ``ready()``, which is asked under the lock. False: not in ``timeout`` seconds.

        Raises:
            StuckError: as for ``lock``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            bell = threading.Lock()
            bell.acquire()
            with self.lock():
                if ready():
                    return True
                left = _RECHECK_S if deadline is None else min(deadline - time.monotonic(), _RECHECK_S)
                if left <= 0:
                    return False
                self._bells.append(bell)
            bell.acquire(timeout=left)

    def _wait_until_free(self) -> None:
        deadline, num_tries = time.monotonic() + self._patience_s, 0
        while self._lock.locked():
            if self._stuck or time.monotonic() > deadline:
                self._stuck = True
                raise StuckError(f"a thread has held the lock of the model's engine for {self._patience_s:g} s")
            time.sleep(0 if num_tries < _NUM_YIELDS else 0.001)
            num_tries += 1
