"""The limits of one client's connection: pipelined bytes, times, size of headers. No routes. uvicorn implements HTTP;
this adds limits that it lacks. A client that exceeds one gets an error and is not read any more; after the current
answer the connection closes.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from paged_openai.pieces import Pieces

_log = logging.getLogger("paged_openai")
_PART = 4096  # bytes that are parsed at a time
_LINGER_S = 1.0  # time for a refused client to read the error: closing a socket with unread bytes would discard it


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a client before its request is complete."""

    max_connections: int = 4096
    max_head_bytes: int = 64 * 2**10  # request line and headers
    head_timeout_s: float = 10.0  # for them to come
    write_timeout_s: float = 60.0  # in which a client reads nothing although bytes wait; over TLS, less than 48 KiB
    max_ahead_bytes: int = 64 * 2**10  # of requests that come before the earlier one is answered


class Connection(HttpToolsProtocol):
    """Bytes after an unanswered request stay unparsed, but reading continues, so that a disconnect is noticed whatever
    the client has sent ahead."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._unanswered: list[RequestResponseCycle] = []  # in the order they came; the first is under way
        self._ahead = bytearray()
        self.deaf = False  # what else comes is not read
        self._in_head = True  # or between two requests
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # ---- the connection ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # so that "paused" means: the client has not read everything yet
        if len(self.connections) > self._limits.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
        self._ahead.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    # ---- what comes ----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        self._ahead += data
        self._parse()
        if len(self._ahead) > self._limits.max_ahead_bytes:
            self._hear_no_more()
        if self.pipeline:
            self.flow.resume_reading()

    def _parse(self) -> None:
        while self._ahead and not self.pipeline and not self.deaf and not self.transport.is_closing():
            part = bytes(self._ahead[:_PART])
            del self._ahead[:_PART]
            if self._in_head:
                self._num_head_bytes += len(part)
                self._time_head()
            super().data_received(part)
            if self._in_head and self._num_head_bytes > self._limits.max_head_bytes:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._in_head, self._num_head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        pieces = Pieces(cast(Any, self.scope), self.flow)
        super().on_headers_complete()
        pieces.cycle = self.cycle
        self._unanswered = [*self._open_cycles(), self.cycle]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ahead:
            self.data_received(b"")

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._num_head_bytes or self._open_cycles():
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()  # no request has begun

    # ---- clients that are heard no more --------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST)

    def shutdown(self) -> None:
        self._hear_no_more()
        super().shutdown()

    def _refuse(self, status: HTTPStatus) -> None:
        self._hear_no_more()
        if self._open_cycles() or self.transport.is_closing():
            return
        text = f"{status.phrase}\n".encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
        head += "Retry-After: 1\r\n" if status is HTTPStatus.SERVICE_UNAVAILABLE else ""
        self.transport.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _hear_no_more(self) -> None:
        """Answer what is under way, and close."""
        self.deaf = True
        self._ahead.clear()
        for cycle in self._open_cycles()[:1]:
            cycle.keep_alive = False

    def _open_cycles(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._unanswered if not cycle.response_complete]

    # ---- clients that don't read ---------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _time_writing(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._see_progress, left)

    def _see_progress(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._time_writing()
        else:
            _log.warning("a client read nothing for %g s; its connection was closed", self._limits.write_timeout_s)
            self.transport.abort()
