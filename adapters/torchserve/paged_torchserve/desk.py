"""Desk: all running requests, between TorchServe's steps and the engine's. TorchServe calls once per step with the
requests that it holds. The desk takes in new requests, drops those no longer listed (their clients have left), waits a
moment for messages, and returns them. Its event loop runs only inside such a call; deltas between two calls wait in the
streams. It knows no TorchServe.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from paged_torchserve.bodies import error_form, read_call
from paged_torchserve.errand import Errand
from paged_torchserve.lanes import Admissions, Lane, emptiest
from paged_torchserve.replies import MESSAGE_BYTES, Reply, ReplyMessage
from paged_torchserve.requests import FrontendRequest

_WAIT_S = 0.05  # wait for messages; a disconnect is noticed after this time
_NUM_COMPILERS = 32  # they wait for other processes


class Desk:
    """``step`` and ``close`` belong to one thread. The rest may be called by others."""

    def __init__(self, lanes: Sequence[Lane], max_reply_bytes: int) -> None:
        self._lanes = lanes
        self._max_bytes = min(MESSAGE_BYTES, max_reply_bytes)
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._compilers = ThreadPoolExecutor(_NUM_COMPILERS, "paged-grammars")
        self._open: dict[str, Errand] = {}
        self._failure: Exception | None = None
        self._in_step = threading.Lock()
        self._last_call = time.monotonic()
        for lane in lanes:
            lane.observers.admissions.tell = self.admitted_soon

    @property
    def is_empty(self) -> bool:
        return not self._open

    @property
    def silence_s(self) -> float:
        """How long TorchServe has not called; 0 during a call."""
        return 0.0 if self._in_step.locked() else time.monotonic() - self._last_call

    def step(self, requests: Sequence[FrontendRequest]) -> list[ReplyMessage | None]:
        """The message for each of ``requests``, in their order; None: nothing this time, and TorchServe passes that
        request's body again."""
        with self._in_step:
            try:
                return self._loop.run_until_complete(self._step(requests))
            finally:
                self._last_call = time.monotonic()

    def drop_if_silent(self, limit_s: float) -> None:
        """Free the requests' resources, if TorchServe has not called for longer than that."""
        if self._in_step.locked():
            return
        with self._in_step:
            if time.monotonic() - self._last_call > limit_s:
                for errand in self._open.values():
                    errand.cancel()

    def refuse_all_soon(self, error: Exception) -> None:
        """Refuse all running and new requests from the next step on."""
        self._call_soon(self._refuse_all, error)

    def admitted_soon(self, by: Admissions, request_id: str) -> None:
        """Called by an engine's thread."""
        self._call_soon(self._admitted, by, request_id)

    def close(self) -> None:
        for request_id in list(self._open):
            self._forget(request_id)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _step(self, requests: Sequence[FrontendRequest]) -> list[ReplyMessage | None]:
        for gone in self._open.keys() - {request.id for request in requests}:
            self._forget(gone)
        for request in requests:
            if request.id not in self._open:
                self._open[request.id] = self._begin(request)
        await self._wait_for_news()
        messages = [self._take(self._open[request.id]) for request in requests]
        for request, message in zip(requests, messages, strict=True):
            if message is not None and message.end is not False:
                self._forget(request.id)
        return messages

    def _take(self, errand: Errand) -> ReplyMessage | None:
        return errand.reply.take() if errand.settled else None

    def _begin(self, request: FrontendRequest) -> Errand:
        lane = emptiest(self._lanes, [each.lane for each in self._open.values()])
        form = error_form(request, lane.target)
        reply = Reply(form.content_type, self._max_bytes, carrier=request.carrier, begun=request.is_orphan)
        errand = Errand(partial(read_call, request, lane.target), form, lane, reply, self._news.set, self._compilers)
        if self._failure is not None:
            errand.fail(self._failure)
        return errand

    async def _wait_for_news(self) -> None:
        """Wait until any request has a message, but not for long, because TorchServe brings new requests with its next
        call."""
        until = time.monotonic() + _WAIT_S
        while not any(each.reply.has_news for each in self._open.values()):
            left = until - time.monotonic()
            if left <= 0:
                return
            self._news.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)

    def _admitted(self, by: Admissions, request_id: str) -> None:
        for each in self._open.values():
            if each.lane.observers.admissions is by:  # each engine numbers requests by itself
                each.admitted(request_id)
        self._news.set()

    def _refuse_all(self, error: Exception) -> None:
        self._failure = error
        for each in self._open.values():
            each.fail(error)
        self._news.set()

    def _forget(self, request_id: str) -> None:
        self._open.pop(request_id).close()

    def _call_soon(self, function: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)
