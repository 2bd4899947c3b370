"""A call's answer over HTTP: JSON or server-sent events, ended when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from paged_core import GenerationOutput, InvalidRequestError
from paged_openai.exchange import CuttableExchange
from paged_openai.pieces import Pieces, pieces_of
from paged_openai.service import Service
from paged_openai.tracing import Traces
from paged_serving import (
    LAST_EVENT,
    Call,
    CallError,
    Failure,
    Listener,
    anthropic_error,
    as_event,
    json_bytes,
    json_text,
    openai_error,
    tgi_error,
)

_log = logging.getLogger("paged_openai")

_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip
_SILENCE_S = 2.0  # of a stream that has no news to tell: clients wait for 5 s (httpx), proxies for a minute
_PIECE = 256  # entries of a list that are encoded at once


class WireFormat(NamedTuple):
    """The form of one protocol's errors and events, and the end of its streams."""

    error: Callable[[Exception], tuple[int, dict[str, Any]]]
    last_event: bytes
    named: bool = False  # its events have names: their types
    keep_alive: bytes = b": it goes on\n\n"  # a comment, as the standard of server-sent events advises
    late_error: Callable[[dict[str, Any], int], Any] = lambda body, num_sent: body  # an error's body, as an event

    def events(self, values: Sequence[Any], encode: Callable[[Any], bytes] = json_bytes) -> bytes:
        if self.named:
            return b"".join([_named_event(value, encode) for value in values])
        return b"".join([as_event(encode(value)) for value in values])


def _named_event(value: Mapping[str, Any], encode: Callable[[Any], bytes]) -> bytes:
    return f"event: {value['type']}\n".encode() + as_event(encode(value))


def _named_error(body: dict[str, Any], num_sent: int) -> dict[str, Any]:
    """OpenAI's event of its responses."""
    return {
        "type": "error",
        "sequence_number": num_sent,
        **{name: body["error"][name] for name in ("code", "message", "param")},
    }


OPENAI = WireFormat(openai_error, LAST_EVENT)
OPENAI_WITHOUT_DONE = WireFormat(openai_error, b"")  # for clients that read every event as JSON
RESPONSES = WireFormat(openai_error, b"", named=True, late_error=_named_error)
ANTHROPIC = WireFormat(anthropic_error, b"", named=True, keep_alive=b'event: ping\ndata: {"type":"ping"}\n\n')
TGI = WireFormat(tgi_error, b"")


def form_of(path: str) -> WireFormat:
    """The form that clients of this path expect."""
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return OPENAI if path.startswith("/v1") else TGI


def large_json_bytes(value: Any) -> bytes:
    """JSON, encoded in small parts, because no other thread runs while the encoder encodes one value."""
    return "".join(_json_pieces(value)).encode(errors="backslashreplace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return _json(json_bytes(value), status, headers)


def error_response(form: WireFormat, error: Exception) -> Response:
    """``error`` in the client's protocol. Errors that are not the client's fault are logged."""
    status, body = _told(form, error)
    return json_response(body, status, _headers_for(error))


def error_note(error: Exception) -> str:
    """``error`` for the log. The message of a refusal may quote the prompt, so only the field is named."""
    if isinstance(error, InvalidRequestError):
        return f"refused: {getattr(error, 'param', None) or 'as a whole'}"
    return str(error)


class CallResponse(Response):
    """Runs ``call`` and sends its answer."""

    def __init__(
        self, service: Service, call: Call, form: WireFormat, notes: dict[str, Any], traces: Traces | None = None
    ) -> None:
        super().__init__()
        self._service = service
        self._call = call
        self._form = form
        self._notes = notes  # for the log
        self._traces = traces
        self._results: Sequence[GenerationOutput] = ()
        self._error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        try:
            await self._carry_out(scope, receive, send)
        finally:
            if self._traces is not None:
                duration_s = time.perf_counter() - began
                headers = Headers(scope=scope)
                self._traces.record(self._call, scope["path"], headers, self._results, self._error, duration_s)

    async def _carry_out(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._service.exchange(self._call) as exchange:
                watcher = asyncio.ensure_future(_until_disconnect(receive, exchange.close))
                try:
                    if self._call.stream:
                        await self._send_events(exchange, _Events(self._form, pieces_of(scope), send))
                    else:
                        with exchange.until_cut():
                            body = await run_in_threadpool(large_json_bytes, await exchange.answer())
                        await _json(body)(scope, receive, send)
                finally:
                    watcher.cancel()
                    self._note(exchange.results)
        except Exception as error:
            self._error, self._notes["error"] = error, error_note(error)
            await error_response(self._form, error)(scope, receive, send)

    async def _send_events(self, exchange: CuttableExchange, events: _Events) -> None:
        """Raises only before anything was sent; later errors are events."""
        try:
            with exchange.until_cut():
                await exchange.tell(events)
        except Exception as error:
            if not events.begun:
                raise
            self._error, self._notes["error"] = error, error_note(error)
            late = self._form.late_error(_told(self._form, error)[1], events.num_written)
            await events.wait_and_tell(self._form.events([late]))
        await events.end()

    def _note(self, results: Sequence[GenerationOutput]) -> None:
        self._results = results
        if results:
            outputs = [output for result in results for output in result.outputs]
            self._notes["prompt_tokens"] = sum(len(result.prompt_token_ids) for result in results)
            self._notes["output_tokens"] = sum(len(output.token_ids) for output in outputs)
            self._notes["finish_reasons"] = sorted({output.finish_reason for output in outputs})


class _Events(Listener[bytes]):
    """One stream of a response's events, as far as it has come."""

    def __init__(self, form: WireFormat, pieces: Pieces | None, send: Send) -> None:
        self._form, self._pieces, self._send = form, pieces, send
        self.begun = False
        self.num_written = 0
        self._told_at = 0.0  # time.monotonic()

    @property
    def ready(self) -> bool:
        return self.begun and self._pieces is not None and self._pieces.ready

    def write(self, chunks: Sequence[Any], large: bool) -> bytes:
        self.num_written += len(chunks)
        return self._form.events(chunks, large_json_bytes if large else json_bytes)

    def tell(self, told: bytes) -> None:
        assert self._pieces is not None, "it was ready"
        if told := told or self._after_silence():
            self._told_at = time.monotonic()
            self._pieces.write(told)

    async def wait_and_tell(self, told: bytes) -> None:
        if not self.begun:
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            self.begun = True
        if told := told or self._after_silence():
            self._told_at = time.monotonic()
            await self._send({"type": "http.response.body", "body": told, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": self._form.last_event, "more_body": False})

    def _after_silence(self) -> bytes:
        """Where there is no news to tell: what clients pass over, so that nobody takes the connection for dead."""
        return self._form.keep_alive if time.monotonic() > self._told_at + _SILENCE_S else b""


def _json(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, dict(headers or {}), media_type="application/json")


def _json_pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and any(isinstance(each, dict | list) for each in value.values()):
        for number, (name, each) in enumerate(value.items()):
            yield f"{',' if number else '{'}{json_text(str(name))}:"
            yield from _json_pieces(each)
        yield "}"
    elif isinstance(value, list) and value:
        for start in range(0, len(value), _PIECE):
            yield "," if start else "["
            piece = value[start : start + _PIECE]
            if any(isinstance(each, dict | list) for each in piece):
                for number, each in enumerate(piece):
                    yield "," if number else ""
                    yield from _json_pieces(each)
            else:
                yield json_text(piece)[1:-1]
        yield "]"
    else:
        yield json_text(value)


async def _until_disconnect(receive: Receive, left: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    left()


def _told(form: WireFormat, error: Exception) -> tuple[int, dict[str, Any]]:
    if not isinstance(error, CallError | InvalidRequestError):
        _log.error("a call failed", exc_info=error)
    return form.error(error)


def _headers_for(error: Exception) -> dict[str, str]:
    if isinstance(error, CallError):
        if error.failure in (Failure.OVERLOADED, Failure.UNAVAILABLE):
            return {"Retry-After": "1"}
        if error.failure is Failure.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
    return {}
