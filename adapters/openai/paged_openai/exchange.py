"""A running call that can be ended from outside: by a timeout, or by a shutdown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anyio import CancelScope, to_thread

from paged_core import AsyncEngine
from paged_serving import Call, CallError, Exchange


class CuttableExchange(Exchange):
    """An Exchange whose ``cut`` reaches its waiters without the engine, whose step may never end."""

    def __init__(self, engine: AsyncEngine, call: Call) -> None:
        self._scope = CancelScope()
        self._is_cut = False
        super().__init__(engine, call, in_thread=to_thread.run_sync)

    def cut(self, error: CallError) -> None:
        """End it early: code inside ``until_cut`` gets ``error``, whatever it waits for."""
        if not self._is_cut:
            self._is_cut, self.aborted = True, error
        self.close()
        self._scope.cancel()

    @contextmanager
    def until_cut(self) -> Iterator[None]:
        """A block that a cut ends at once. To be entered once.

        Raises:
            CallError: it was cut.
        """
        with self._scope:
            yield
        if self._scope.cancelled_caught:
            raise self.aborted
