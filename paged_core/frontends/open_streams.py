"""OpenStreams: AsyncEngine's open requests. Its thread admits them, steps, and pushes results to their Channels.

A Channel never makes that thread wait: results that its reader hasn't fetched yet are joined into one delta.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from paged_core.engine.engine import Engine
from paged_core.errors import EngineBusyError, EngineDeadError, InvalidRequestError, RequestError
from paged_core.frontends.channel import Channel, Wakeups
from paged_core.frontends.engine_thread import EngineThread
from paged_core.frontends.locks import StuckError
from paged_core.frontends.thread_policy import ThreadPolicy
from paged_core.text.codec import TextCodec
from paged_core.text.generation import Generation, deliver
from paged_core.text.outputs import StreamDelta

_T = TypeVar("_T")

_SAVE_AFTER_S = 1.0  # without work, before blocks are stored in tiers, as the process may be killed at any time


class Submitted(NamedTuple):
    generation: Generation
    channel: Channel


class OpenStreams(ThreadPolicy):
    """At most ``max_requests`` open requests. It holds its thread from the first request until ``close``."""

    def __init__(self, engine: Engine, codec: TextCodec, max_requests: int) -> None:
        self._engine, self._codec = engine, codec
        self._max_requests = max_requests
        self._running: dict[str, Submitted] = {}  # requests are added under the lock; all else is done by the thread
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()  # those that somebody may still read
        self._closed = False
        self._dead: BaseException | None = None
        self._save_in_s: float | None = None
        self.thread = EngineThread("paged-engine", self)

    # ---- for all threads -----------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """The number of requests whose streams have not ended."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        return self._dead is None and not self._closed and self._engine.trouble is None

    def check_open(self) -> None:
        """
        Raises:
            EngineDeadError: the engine was closed, or has failed.
        """
        self._check_alive()
        if self._closed:
            raise EngineDeadError("the engine is closed")

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise _told(self._dead)

    def channel(self, request_id: str) -> Channel:
        return Channel(request_id, self._cancel_soon, self.thread.check_may_wait)

    def add(self, generation: Generation, channel: Channel) -> None:
        """Add a request. Raises what AsyncEngine.submit does."""
        submitted, request_id = Submitted(generation, channel), generation.request_id
        with self.thread.lock():
            self.check_open()
            if request_id in self._running:
                raise InvalidRequestError(f"request id {request_id!r} is in use; choose another")
            if len(self._running) >= self._max_requests:
                raise EngineBusyError(f"{self._max_requests} requests are under way, the limit; try again soon")
            self.thread.hold(self)
            self._channels.add(channel)
            self._running[request_id] = submitted
            self.thread.post(lambda: self._admit(submitted))

    def look(self, function: Callable[[Engine], _T]) -> Future[_T]:
        """See AsyncEngine.look."""

        def look() -> _T:
            self._check_alive()
            return function(self._engine)

        with self.thread.lock():
            self.check_open()
            self.thread.hold(self)
            return self.thread.call(look)

    def close(self, timeout: float | None = None) -> bool:
        """End the thread. Returns False if it has not ended in ``timeout`` seconds."""
        with self.thread.lock():
            first, self._closed = not self._closed, True
        if first:
            self.thread.leave(self, self._finish)
        return self.thread.wait_until_free(timeout)

    def _cancel_soon(self, channel: Channel) -> None:
        self.thread.post(lambda: self._cancel(channel))

    # ---- in the thread -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        if self._dead is not None or not self._engine.has_work:
            return False
        wakeups = Wakeups()
        self._save_in_s = _SAVE_AFTER_S
        for output in self._engine.step():
            submitted = self._running.get(output.request.id)
            if submitted is not None:
                self._push(submitted, deliver(self._engine, submitted.generation, output), wakeups)
        wakeups.send()
        return True

    @property
    def idle_s(self) -> float | None:
        return self._save_in_s

    def idle(self) -> None:
        self._save_in_s = 0.0 if self._dead is None and self._engine.save_some() else None

    def failed(self, error: BaseException) -> None:
        self._dead = error
        # Callers that were adding a request have done so, or will be refused
        with suppress(StuckError), self.thread.lock():
            self.thread.holders.discard(self)
        wakeups = Wakeups()
        for submitted in list(self._running.values()):
            submitted.channel.fail(_told(error), wakeups)
        self._running.clear()
        wakeups.send()
        with suppress(Exception):
            self._engine.close()

    def _admit(self, submitted: Submitted) -> None:
        generation, channel = submitted
        if self._running.get(generation.request_id) is not submitted:
            return  # the engine has failed, and the channel was told
        if channel.cancelled:
            self._abort([submitted])  # without a step
            return
        try:
            self._engine.add_request(
                generation.request_id,
                generation.prompt.token_ids,
                generation.params,
                eos_token_ids=self._codec.eos_token_ids,
            )
        except EngineDeadError:
            raise
        except InvalidRequestError as error:
            self._refuse(submitted, error)
        except BaseException as error:
            self._engine.abort(generation.request_id)
            self._refuse(submitted, RequestError(generation.request_id, f"it could not be taken in: {error!r}"))

    def _cancel(self, channel: Channel) -> None:
        submitted = self._running.get(channel.request_id)
        if submitted is not None and submitted.channel is channel:  # not a later request with the same id
            self._engine.abort(channel.request_id)

    def _push(self, submitted: Submitted, deltas: Sequence[StreamDelta], wakeups: Wakeups) -> None:
        generation, channel = submitted
        result = None
        if generation.finished:
            del self._running[generation.request_id]
            result = generation.result()
        channel.push(deltas, result, wakeups)

    def _refuse(self, submitted: Submitted, error: Exception) -> None:
        del self._running[submitted.generation.request_id]
        wakeups = Wakeups()
        submitted.channel.fail(error, wakeups)
        wakeups.send()

    def _abort(self, many: Sequence[Submitted]) -> None:
        wakeups = Wakeups()
        for submitted in many:
            self._engine.abort(submitted.generation.request_id)
            self._push(submitted, submitted.generation.abort(), wakeups)
        wakeups.send()

    def _finish(self) -> None:
        if self._dead is None:
            self._abort(list(self._running.values()))
            self._engine.close()

    # ---- the process ---------------------------------------------------------------------------------------------

    def forked(self, holders: set[Any], ran: bool) -> None:
        """The child has a copy of the engine, and streams that will get no more results. If the thread never ran, the
        child's own starts with its first request."""
        forked = EngineDeadError("the process was forked; build an engine in the child")
        if ran:
            self._dead = self._dead or forked
        self._codec.renew_locks()
        self._running.clear()
        for channel in list(self._channels):
            channel.forked(_told(forked))

    def shut_down(self) -> None:
        self.close()


def _told(error: BaseException) -> EngineDeadError:
    """Return a new error, for each caller, that says why the engine ended."""
    told = EngineDeadError(f"the engine has failed: {error if isinstance(error, EngineDeadError) else repr(error)}")
    told.__cause__ = error
    return told
