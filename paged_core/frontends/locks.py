"""Locks that no exception from outside can leave locked, and a lock that raises if it is never released.

An exception may strike a thread anywhere: Ctrl-C, or one that another thread sends (libraries that limit time do that).
A lock that is entered by Python code, such as ``threading.Condition``, stays locked for ever if an exception strikes
after the lock was taken and before the ``with`` block has begun. A bare lock is entered and left by the interpreter
itself, where none can strike.
"""

from __future__ import annotations

import threading
import time
from operator import attrgetter

from paged_core.errors import EngineDeadError

_PATIENCE_S = 20.0  # the lock is held for moments only, so a longer wait would never end
_NUM_YIELDS = 100


class StuckError(EngineDeadError):
    """The lock will never be released."""


class PatientLock:
    """Use it as ``with lock.bare(): ...``. It is not reentrant."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._lock = threading.Lock()
        self._patience_s = patience_s
        self._stuck = False

    def bare(self) -> threading.Lock:
        """Return the lock, for the caller's own ``with``.

        Raises:
            StuckError: the lock is never released.
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
    """A Condition that is entered and left by the interpreter itself, because ``with`` finds the bare lock's
    methods."""

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))
