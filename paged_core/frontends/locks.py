"""Locks that no exception from outside can leave locked; and one that says so should it be locked for ever.

An exception may strike a thread anywhere: Ctrl-C, or one that another thread sends it (libraries that limit time do).
A lock that is entered by Python code, as ``threading.Condition`` is, stays locked for ever if one strikes after the
lock was taken and before the ``with`` block has begun. A bare lock is entered and left by the interpreter itself, where
nothing strikes.
"""

from __future__ import annotations

import threading
import time
from operator import attrgetter

from paged_core.errors import EngineDeadError

_PATIENCE_S = 20.0  # the lock is held for moments only: whoever waits for it longer waits for ever
_NUM_YIELDS = 100


class StuckError(EngineDeadError):
    """The lock will not be given back any more."""


class PatientLock:
    """``with lock.bare(): ...``. Whoever holds it must not ask for it again."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._lock = threading.Lock()
        self._patience_s = patience_s
        self._stuck = False

    def bare(self) -> threading.Lock:
        """The lock, for a ``with`` of the caller's own.

        Raises:
            StuckError: nobody gives it back.
        """
        if self._lock.locked():
            self._wait_until_free()
        self._stuck = False
        return self._lock

    def _wait_until_free(self) -> None:
        deadline, num_tries = time.monotonic() + self._patience_s, 0
        while self._lock.locked():
            if self._stuck or time.monotonic() > deadline:
                self._stuck = True
                raise StuckError(f"a thread has held the lock of the engine's thread for {self._patience_s:g} s")
            time.sleep(0 if num_tries < _NUM_YIELDS else 0.001)
            num_tries += 1


class BareCondition(threading.Condition):
    """A Condition that is entered and left by the interpreter itself: its ``with`` finds the bare lock's methods."""

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))
