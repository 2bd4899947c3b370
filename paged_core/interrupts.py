"""Which exceptions interrupt the process, and which are the business of the request in whose code they came up.

Code that a request or a plugin brings may raise anything, SystemExit and KeyboardInterrupt too. Whoever calls it ends
that request alone, unless a signal of the process has come while the code ran.
"""

from __future__ import annotations

import dis
import functools
import signal
import threading
from collections.abc import Iterator
from types import CodeType
from typing import Any

_RAISE = dis.opmap["RAISE_VARARGS"]


def interrupts_the_process(error: BaseException) -> bool:
    """Whether a signal has raised it: Ctrl-C, or a handler that raises (of SIGTERM or SIGALRM, say).

    To be asked where ``error`` is caught: its traceback tells. Python runs handlers in the main thread only, between
    two instructions of whatever runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    places = list(_places(error))
    handlers = set(map(_code_of, map(signal.getsignal, signal.valid_signals()))) - {None}
    if any(code in handlers for code, _ in places):
        return True
    if not isinstance(error, KeyboardInterrupt) or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    code, instruction = places[-1]  # Python's own handler leaves no frame; where it strikes is no raise statement
    return code.co_code[instruction] != _RAISE


def _places(error: BaseException) -> Iterator[tuple[CodeType, int]]:
    """The code that the exception came through, and the byte it was at, from the outermost on."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lasti
        traceback = traceback.tb_next


def _code_of(handler: Any) -> CodeType | None:
    """The code of a handler of signals; None: it is none of Python's."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    code = getattr(handler, "__code__", None)
    return code if isinstance(code, CodeType) else None
