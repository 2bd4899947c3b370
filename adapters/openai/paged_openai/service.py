"""The engine as a service: how many calls are accepted, their time limits, and the shutdown. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from paged_core import AsyncEngine
from paged_openai.exchange import CuttableExchange
from paged_serving import Call, CallError, Failure, ProtocolError, ServedModel, as_outcome, compile_grammar, trouble

_T = TypeVar("_T")
_NUM_READERS = 4  # tokenising runs one at a time anyway
_LARGE = 32 * 2**10  # bytes of a body: larger bodies wait for each other, and small ones never wait for them
_NUM_COMPILING = 64  # they only wait for other processes


class Service:
    """Belongs to one event loop.

    Args:
        max_queue: sequences that may wait, besides those that the engine runs at once.
        max_unread_bytes: most bytes of all bodies that are not calls yet.
        timeout_s: the longest that one call may take; None: no limit.
        step_timeout_s: an engine whose step takes longer counts as stuck.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        served: ServedModel,
        *,
        max_queue: int = 1000,
        max_unread_bytes: int = 64 * 2**20,
        timeout_s: float | None = None,
        step_timeout_s: float = 300.0,
    ) -> None:
        self.engine = engine
        self.served = served
        self.draining = False
        self.timeout_s, self._step_timeout_s = timeout_s, step_timeout_s
        self._max_unread_bytes = max_unread_bytes
        self.num_unread_bytes = 0  # of all bodies that are not calls yet
        self._open: set[CuttableExchange] = set()
        self._num_open = 0  # sequences
        self.max_open = engine.engine.sizes.max_num_seqs + max_queue

    @property
    def trouble(self) -> str | None:
        """The trouble of the engine, or None."""
        return trouble(self.engine, self._step_timeout_s, "--step-timeout")

    @property
    def num_open(self) -> int:
        """Running and waiting sequences, and requests that aren't calls yet."""
        return self._num_open

    @property
    def ready(self) -> bool:
        return self.trouble is None and not self.draining

    def check_room(self, num_sequences: int = 1) -> None:
        """Raises CallError if there is no room for so many sequences now."""
        if self.draining:
            raise CallError(Failure.UNAVAILABLE, "the server is shutting down")
        if self.engine.alive and self.trouble is not None:  # if it has failed, submit raises a better error
            raise CallError(Failure.UNAVAILABLE, self.trouble)
        if num_sequences > self.max_open:
            told = f"{num_sequences} sequences were asked for at once; this server holds {self.max_open} at most"
            raise ProtocolError(told, "n")
        if self._num_open + num_sequences > self.max_open:
            told = f"the queue is full: {self.max_open} sequences are under way, the limit; try again soon"
            raise CallError(Failure.OVERLOADED, told)

    @contextmanager
    def arrival(self) -> Iterator[Callable[[int], None]]:
        """A request that isn't a call yet: it counts as one sequence for as long as the block lasts. The yielded
        function must be called with the number of received bytes; it raises CallError if all bodies together are too
        large.

        Raises:
            CallError: there is no room for it.
        """
        self.check_room()
        num_bytes = 0

        def count(more: int) -> None:
            nonlocal num_bytes
            if self.num_unread_bytes + more > self._max_unread_bytes:
                raise CallError(Failure.OVERLOADED, "too many large bodies at once; try again soon")
            num_bytes += more
            self.num_unread_bytes += more

        self._num_open += 1
        try:
            yield count
        finally:
            self._num_open -= 1
            self.num_unread_bytes -= num_bytes

    async def read(self, function: Callable[[bytes], _T], raw: bytes) -> _T:
        """Call ``function(raw)``, which reads a body, in one of a few threads, so that it does not delay other
        streams."""
        readers = self._readers if len(raw) <= _LARGE else self._large_readers
        return await to_thread.run_sync(as_outcome, function, raw, limiter=readers)

    async def compile(self, call: Call) -> None:
        """Compile the call's grammar, if it has one. This may take long; calls without a grammar don't wait for it.

        Raises:
            CallError, InvalidRequestError: as ``compile_grammar``.
        """
        if call.grammar is not None:
            await to_thread.run_sync(as_outcome, compile_grammar, call, limiter=self._compilers, abandon_on_cancel=True)

    @cached_property
    def _compilers(self) -> CapacityLimiter:
        return CapacityLimiter(_NUM_COMPILING)

    @cached_property
    def _readers(self) -> CapacityLimiter:
        return CapacityLimiter(_NUM_READERS)

    @cached_property
    def _large_readers(self) -> CapacityLimiter:
        return CapacityLimiter(_NUM_READERS)

    @contextmanager
    def exchange(self, call: Call) -> Iterator[CuttableExchange]:
        """Runs ``call`` while the block lasts.

        Raises:
            CallError, ProtocolError: there is no room for it.
            EngineDeadError: the engine takes no requests any more.
        """
        num_sequences = len(call.prompts) * call.params.n
        self.check_room(num_sequences)
        exchange = CuttableExchange(self.engine, call)
        self._open.add(exchange)
        self._num_open += num_sequences
        timer = None
        if self.timeout_s is not None:
            late = CallError(Failure.TIMEOUT, f"the request was not done in {self.timeout_s:g} s")
            timer = asyncio.get_running_loop().call_later(self.timeout_s, exchange.cut, late)
        try:
            yield exchange
        finally:
            if timer is not None:
                timer.cancel()
            exchange.close()
            self._open.discard(exchange)
            self._num_open -= num_sequences

    def drain(self, after_s: float) -> None:
        """Accept no more calls, and cut those that still run after so many seconds."""
        self.draining = True
        asyncio.get_running_loop().call_later(after_s, self._cut_all)

    def _cut_all(self) -> None:
        for exchange in self._open:
            exchange.cut(CallError(Failure.CUT, "the server is shutting down"))
