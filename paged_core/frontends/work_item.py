"""WorkItem: a function that another thread calls, and a Future for its result. It knows nothing of engines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

from paged_core.frontends.locks import BareCondition

_T = TypeVar("_T")


class WorkItem(Future[_T]):
    """A call of ``function``. ``check_may_wait`` raises in the thread that is to call it, which would wait for
    itself."""

    def __init__(self, function: Callable[[], _T], check_may_wait: Callable[[], None]) -> None:
        super().__init__()
        self._condition = BareCondition()  # an exception that strikes a reader doesn't leave it locked
        self._function = function
        self._check_may_wait = check_may_wait

    def run(self) -> None:
        """Call the function, unless the call was cancelled."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            found = self._function()
        except BaseException as error:  # any exception is for the caller
            self.set_exception(error)
        else:
            self.set_result(found)

    def forked(self, error: Exception) -> None:
        """Called in a forked child, where no thread will call it. The thread that held the condition in the parent
        doesn't exist there."""
        self._condition = BareCondition()
        with suppress(InvalidStateError):  # it has its result already
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
