"""Endpoints that read a body: calls of every protocol, and routes that don't need the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from paged_openai.ignored import IgnoredFields
from paged_openai.responses import CallResponse, WireFormat, error_note, error_response, large_json_bytes
from paged_openai.service import Service
from paged_openai.tracing import Traces
from paged_serving import Body, Call, CallError, Failure, ServedModel, parse_json, unknown_fields

Endpoint = Callable[[Request], Awaitable[Response]]
MakeCall = Callable[[Any, ServedModel, str], Call]  # parsed JSON, the model, the request's id


class BodyLimits(NamedTuple):
    """Of the bodies that come."""

    max_bytes: int
    timeout_s: float  # for the whole of one


class Endpoints:
    """Threads parse bodies and tokenise prompts."""

    def __init__(self, service: Service, limits: BodyLimits, traces: Traces | None, *, log_prompts: bool) -> None:
        self._service, self._limits, self._traces = service, limits, traces
        self._log_prompts = log_prompts
        self._ignored = IgnoredFields()

    def call(self, make: MakeCall, declared: type[Body], form: WireFormat) -> Endpoint:
        """Of a generating route, whose bodies are ``declared``."""

        async def endpoint(request: Request) -> Response:
            notes, began = request.scope["notes"], time.perf_counter()

            def read(raw: bytes) -> Call:
                return make(self._parsed(raw, declared, request), self._service.served, request.scope["request_id"])

            try:
                with self._service.arrival() as count:
                    call = await self._service.read(read, await self._body(request, count))
                    await self._service.compile(call)
            except Exception as error:
                notes["error"] = error_note(error)
                if self._traces is not None:
                    duration_s = time.perf_counter() - began
                    self._traces.record(None, request.scope["path"], request.headers, (), error, duration_s)
                return error_response(form, error)
            return CallResponse(self._service, call, form, notes, self._traces)

        return endpoint

    def answer(self, make: Callable[[Any, ServedModel], Any], declared: type[Body], form: WireFormat) -> Endpoint:
        """Of a route that needs the model's text side only: ``make`` is its answer to a body."""

        async def endpoint(request: Request) -> Response:
            def read(raw: bytes) -> bytes:
                return large_json_bytes(make(self._parsed(raw, declared, request), self._service.served))

            try:
                with self._service.arrival() as count:
                    body = await self._service.read(read, await self._body(request, count))
            except Exception as error:
                return error_response(form, error)
            return Response(body, media_type="application/json")

        return endpoint

    def _parsed(self, raw: bytes, declared: type[Body], request: Request) -> Any:
        body = parse_json(raw)
        if self._log_prompts:
            request.scope["notes"]["body"] = body
        if not self._service.served.strict_fields:
            self._ignored.note(request.scope, unknown_fields(body, declared))
        return _without_own_url(body, request.headers)

    async def _body(self, request: Request, count: Callable[[int], None]) -> bytes:
        """Raises CallError for a body that is too large or comes too slowly. ``count`` is told of its bytes."""
        limit, timeout_s = self._limits
        try:
            return await asyncio.wait_for(_read(request, limit, count), timeout_s)
        except asyncio.TimeoutError:
            raise CallError(Failure.TOO_SLOW, f"the body did not come in {timeout_s:g} s") from None
        except ClientDisconnect:
            raise CallError(Failure.CUT, "the client left") from None


def _without_own_url(body: Any, headers: Headers) -> Any:
    """Remove the server's own URL as a model name, which Hugging Face's clients send."""
    name = body.get("model") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name.startswith(("http://", "https://")):
        return body
    ours = {headers.get("host"), headers.get("x-forwarded-host")}
    return {**body, "model": None} if _host_of(name) in ours else body


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return ""


async def _read(request: Request, limit: int, count: Callable[[int], None]) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        count(len(part))
        if size > limit:
            raise CallError(Failure.TOO_LARGE, f"the body has more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)
