"""The engine as a service: how many calls it takes, for how long, and how it comes to rest. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from paged_core import AsyncEngine, Call, CallError, Failure, ProtocolError, ServedModel
from paged_openai.exchange import Exchange


class Service:
    """Belongs to one event loop.

    Args:
        max_queue: sequences that may wait beside those that the engine runs at once.
        timeout_s: the longest that one call may take; None: no limit.
    """

    def __init__(
        self, engine: AsyncEngine, served: ServedModel, *, max_queue: int = 1000, timeout_s: float | None = None
    ) -> None:
        self.engine = engine
        self.served = served
        self.draining = False
        self._timeout_s = timeout_s
        self._open: set[Exchange] = set()
        self._num_open = 0  # sequences
        max_num_seqs = engine.engine.config.max_num_seqs
        assert max_num_seqs is not None, "a built engine knows it"
        self.max_open = max_num_seqs + max_queue

    @property
    def ready(self) -> bool:
        return self.engine.alive and not self.draining

    def check_room(self, num_sequences: int = 1) -> None:
        """Raises CallError if so many can't be taken in now."""
        if self.draining:
            raise CallError(Failure.UNAVAILABLE, "the server is shutting down")
        if num_sequences > self.max_open:
            told = f"{num_sequences} sequences were asked for at once; this server holds {self.max_open} at most"
            raise ProtocolError(told, "n")
        if self._num_open + num_sequences > self.max_open:
            raise CallError(Failure.OVERLOADED, "the queue is full; try again soon")

    @contextmanager
    def exchange(self, call: Call) -> Iterator[Exchange]:
        """``call`` under way, for as long as the block lasts.

        Raises:
            CallError, ProtocolError: there is no room for it.
            EngineDeadError: the engine takes no requests any more.
        """
        num_sequences = len(call.prompts) * call.params.n
        self.check_room(num_sequences)
        exchange = Exchange(self.engine, call)
        self._open.add(exchange)
        self._num_open += num_sequences
        timer = None
        if self._timeout_s is not None:
            late = CallError(Failure.TIMEOUT, f"the request was not done in {self._timeout_s:g} s")
            timer = asyncio.get_running_loop().call_later(self._timeout_s, exchange.cut, late)
        try:
            yield exchange
        finally:
            if timer is not None:
                timer.cancel()
            exchange.close()
            self._open.discard(exchange)
            self._num_open -= num_sequences

    def drain(self, after_s: float) -> None:
        """Take no more calls, and cut those that still run after so many seconds."""
        self.draining = True
        asyncio.get_running_loop().call_later(after_s, self._cut_all)

    def _cut_all(self) -> None:
        for exchange in self._open:
            exchange.cut(CallError(Failure.CUT, "the server is shutting down"))
