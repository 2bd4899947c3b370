"""Exceptions that one thread sends another, which strike it anywhere."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LIMIT_S = 60.0
_NO_BIRTHS = threading.Lock()  # held where a thread is started, and where a strike is sent


class Struck(BaseException):
    """What another thread sends."""


@contextmanager
def strikes_anywhere() -> Iterator[None]:
    """Threads switch everywhere; but no strike is sent while a thread is born. CPython knows a thread under its
    parent's identity until it runs: a strike that is sent in this moment may hit the child instead, which dies of it,
    and Thread.start() then waits for it for ever. A strike that hits before a thread has begun its work, or after it,
    is no failure of the work's."""
    start, interval, told = threading.Thread.start, sys.getswitchinterval(), threading.excepthook

    def starts_unstruck(thread: threading.Thread) -> None:
        with _NO_BIRTHS:
            start(thread)

    def passes_over_strikes(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not Struck:
            told(failed)

    threading.Thread.start = starts_unstruck  # type: ignore[method-assign]
    threading.excepthook = passes_over_strikes
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        threading.excepthook = told
        threading.Thread.start = start  # type: ignore[method-assign]


def strike_until_it_ends(work: Callable[[], object], delay_s: float) -> None:
    """Run ``work`` in a thread, and send that thread one exception after a while."""

    def run() -> None:
        with suppress(Struck):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(delay_s)
    with _NO_BIRTHS:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Struck))
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "a caller hangs"
