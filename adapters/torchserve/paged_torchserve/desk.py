"""Desk: all requests under way, between TorchServe's steps and the engine's.

TorchServe calls once a step with the requests it holds. The desk submits what is new, drops what is no longer listed
(those clients have left), waits a moment for news, and hands it out. Its event loop runs only inside such a call; what
the engine says between two calls waits in the streams. It knows no TorchServe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from paged_core import AsyncEngine, CallError, InvalidRequestError, ServedModel, hookimpl
from paged_torchserve.bodies import JSON, Request, error_form, read_call
from paged_torchserve.exchange import Exchange, refuse
from paged_torchserve.replies import MESSAGE_BYTES, Message, Reply
from paged_torchserve.settings import Settings

_WAIT_S = 0.05  # for news; a client that leaves is noticed after as long
_ADMISSION_S = 5.0  # for the engine to take a request in or refuse it: it does so between two of its steps
_log = logging.getLogger("paged_torchserve")


class Admissions:
    """The engine's observer that tells which requests it has taken in."""

    def __init__(self) -> None:
        self.desk: Desk | None = None

    @hookimpl
    def on_request_added(self, request: Any) -> None:
        if self.desk is not None:
            self.desk.admitted_soon(request.id)


class Desk:
    """Belongs to the thread that calls ``step``; ``drop_all`` may be called by others."""

    def __init__(self, engine: AsyncEngine, served: ServedModel, settings: Settings, admissions: Admissions) -> None:
        self.last_call = time.monotonic()
        self.in_step = False
        self._engine, self._served, self._settings = engine, served, settings
        self._max_bytes = min(MESSAGE_BYTES, settings.max_reply_bytes)
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._open: dict[str, Exchange | Reply] = {}  # a Reply: refused before it got to the engine
        admissions.desk = self

    @property
    def is_empty(self) -> bool:
        return not self._open

    def step(self, requests: Sequence[Request]) -> list[Message]:
        """One message for each of ``requests``, in their order."""
        self.in_step = True
        self.last_call = time.monotonic()  # before anything is open: see Watch
        try:
            return self._loop.run_until_complete(self._step(requests))
        finally:
            self.last_call = time.monotonic()
            self.in_step = False

    def drop_all(self) -> None:
        """Free what the requests hold: nobody asks for their news."""
        for exchange in list(self._open.values()):
            if isinstance(exchange, Exchange):
                exchange.cancel()

    def admitted_soon(self, request_id: str) -> None:
        """Called by the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._admitted, request_id)

    def close(self) -> None:
        for request_id in list(self._open):
            self._forget(request_id)
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _step(self, requests: Sequence[Request]) -> list[Message]:
        for gone in self._open.keys() - {request.id for request in requests}:
            self._forget(gone)
        for request in requests:
            if request.id not in self._open:
                self._open[request.id] = self._begin(request)
        await self._wait_for_news()
        messages = [_reply(self._open[request.id]).take() for request in requests]
        for request, message in zip(requests, messages, strict=True):
            if message.end is not False:
                self._forget(request.id)
        return messages

    def _begin(self, request: Request) -> Exchange | Reply:
        form = error_form(request)
        try:
            call, form = read_call(request, self._served, self._settings)
            reply = Reply(form.stream_type if call.stream else form.content_type, self._max_bytes)
            return Exchange(call, form, self._engine, reply, self._news.set)
        except Exception as error:  # one request's failure is never another's
            if not isinstance(error, CallError | InvalidRequestError):
                _log.error("a request could not be taken in", exc_info=error)
            reply = Reply(JSON, self._max_bytes)
            refuse(reply, form, error)
            return reply

    async def _wait_for_news(self) -> None:
        began = time.monotonic()
        while not self._has_news or not self._settled:
            left = began + (_WAIT_S if self._settled else _ADMISSION_S) - time.monotonic()
            if left <= 0:
                return
            self._news.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)

    @property
    def _has_news(self) -> bool:
        return any(_reply(each).has_news for each in self._open.values())

    @property
    def _settled(self) -> bool:
        return all(not isinstance(each, Exchange) or each.settled for each in self._open.values())

    def _admitted(self, request_id: str) -> None:
        for each in self._open.values():
            if isinstance(each, Exchange):
                each.admitted(request_id)
        self._news.set()

    def _forget(self, request_id: str) -> None:
        gone = self._open.pop(request_id)
        if isinstance(gone, Exchange):
            gone.close()


def _reply(each: Exchange | Reply) -> Reply:
    return each.reply if isinstance(each, Exchange) else each
