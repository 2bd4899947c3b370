"""WorkItem: a function that another thread is to call, and the Future of what it comes to. It knows no engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

from paged_core.frontends.locks import BareCondition

_T = TypeVar("_T")


class WorkItem(Future[_T]):
    """``check_may_wait`` raises in the thread that is to call ``function``: what it would wait for would never come."""

    def __init__(self, function: Callable[[], _T], check_may_wait: Callable[[], None]) -> None:
        super().__init__()
        self._condition = BareCondition()  # a reader that is struck doesn't keep it from the one who answers
        self._function = function
        self._check_may_wait = check_may_wait

    def run(self) -> None:
        """Call the function, unless nobody wants to know any more."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            found = self._function()
        except BaseException as error:  # whatever it is, it is for who asked
            self.set_exception(error)
        else:
            self.set_result(found)

    def forked(self, error: Exception) -> None:
        """In a forked child, where nobody will call it; who held the condition in the parent isn't here."""
        self._condition = BareCondition()
        with suppress(InvalidStateError):  # it has its answer
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> _T:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if not self.done():
            self._check_may_wait()
