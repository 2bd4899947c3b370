"""Which exceptions interrupt the process, and which end only the request whose code raised them.

Code that a request or a plugin brings may raise anything, SystemExit and KeyboardInterrupt too. Its caller then ends
that request alone, unless a signal to the process raised the exception while the code ran.
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
    """Return whether a signal raised ``error``: Ctrl-C, or a handler that raises (of SIGTERM or SIGALRM, for example).

    Call this where ``error`` is caught, because the answer is read from its traceback. Python runs signal handlers in
    the main thread only, between two instructions of the code that runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    places = list(_places(error))
    handlers = set(map(_code_of, map(signal.getsignal, signal.valid_signals()))) - {None}
    if any(code in handlers for code, _ in places):
        return True
    if not isinstance(error, KeyboardInterrupt) or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    # Python's own SIGINT handler leaves no frame, and what it interrupts is not a raise statement
    code, instruction = places[-1]
    return code.co_code[instruction] != _RAISE


def _places(error: BaseException) -> Iterator[tuple[CodeType, int]]:
    """Yield each code object that the exception passed through, outermost first, with the offset of its instruction in
    bytes."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lasti
        traceback = traceback.tb_next


def _code_of(handler: Any) -> CodeType | None:
    """Return the code of a signal handler, or None if it is not written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    code = getattr(handler, "__code__", None)
    return code if isinstance(code, CodeType) else None
