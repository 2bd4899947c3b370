"""Exceptions that one thread sends another, which may strike it anywhere."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LIMIT_S = 60.0
_NO_BIRTHS = threading.Lock()  # held while a thread is started, and while a strike is sent


class Struck(BaseException):
    """The exception that another thread sends."""


@contextmanager
def strikes_anywhere() -> Iterator[None]:
    """Make threads switch often, but send no strike while a thread is starting. Until a new thread runs, CPython knows
    it under its parent's identity. A strike sent in that moment may hit the new thread instead, which ends, and
    Thread.start() then waits for it for ever. A strike that hits a thread before its work has begun, or after it, is no
    failure of the work."""
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
    """Run ``work`` in a thread, and send that thread one exception after ``delay_s``."""

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
