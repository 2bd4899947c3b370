"""The routes: which path speaks which protocol. Everything behind them is in Service and the core's calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from paged_core import __version__
from paged_openai.keys import KeyCheck
from paged_openai.logs import RequestLog
from paged_openai.openapi import openapi
from paged_openai.origins import OriginCheck
from paged_openai.page import Page
from paged_openai.responses import (
    OPENAI,
    OPENAI_WITHOUT_DONE,
    TGI,
    CallResponse,
    Form,
    error_note,
    error_response,
    form_of,
    json_response,
    large_json_bytes,
)
from paged_openai.service import Service
from paged_openai.slashes import OptionalSlash
from paged_openai.tracing import Traces
from paged_openai.unread import CloseUnread
from paged_serving import (
    Call,
    CallError,
    ChatCall,
    CompletionCall,
    Failure,
    PrometheusMetrics,
    ProtocolError,
    ServedModel,
    TGICall,
    parse_json,
    tokenize,
)

_Endpoint = Callable[[Request], Awaitable[Response]]
_MakeCall = Callable[[Any, ServedModel, str], Call]


@dataclass(frozen=True)
class AppOptions:
    """What a server does beside answering."""

    api_keys: tuple[str, ...] = ()  # none: everybody is let in
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2 * 2**20
    body_timeout_s: float = 30.0
    tgi_chat_stream: bool = False  # stream chats as TGI's clients read them, and not as OpenAI's do
    log_prompts: bool = False
    page: bool = True  # for browsers
    traces: Traces | None = None


def create_app(service: Service, metrics: PrometheusMetrics | None, options: AppOptions | None = None) -> Starlette:
    """The ASGI application."""
    options = options or AppOptions()
    routes = _Routes(service, metrics, options)
    chat: _MakeCall = ChatCall
    chat_form = OPENAI
    if options.tgi_chat_stream:
        chat, chat_form = partial(ChatCall, whole_deltas=True), OPENAI_WITHOUT_DONE
    middleware = [Middleware(CloseUnread), Middleware(OptionalSlash), Middleware(RequestLog)]
    if options.cors_origins:
        origins = list(options.cors_origins)
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    if options.api_keys:
        middleware.append(Middleware(KeyCheck, keys=options.api_keys))
    else:
        middleware.append(Middleware(OriginCheck, origins=options.cors_origins))
    app = Starlette(
        routes=[
            Route("/v1/completions", routes.call(CompletionCall, OPENAI), methods=["POST"]),
            Route("/v1/chat/completions", routes.call(chat, chat_form), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/", routes.call(_tgi(None), TGI), methods=["POST"]),
            Route("/generate", routes.call(_tgi(False), TGI), methods=["POST"]),
            Route("/generate_stream", routes.call(_tgi(True), TGI), methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/info", routes.info),
            Route("/openapi.json", routes.openapi),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            *(_page_routes(service) if options.page else ()),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _no_such_route},
    )
    app.router.redirect_slashes = False  # it would send the client to whatever its Host header says
    return app


def _page_routes(service: Service) -> list[Route]:
    page = Page(service)
    return [Route("/", page.page, include_in_schema=False), Route("/live", page.live, include_in_schema=False)]


class _Routes:
    def __init__(self, service: Service, metrics: PrometheusMetrics | None, options: AppOptions) -> None:
        self._service = service
        self._served = service.served
        self._metrics = metrics
        self._options = options
        self._created = int(time.time())
        self._document: dict[str, Any] | None = None

    def call(self, make: _MakeCall, form: Form) -> _Endpoint:
        """The endpoint of a generating route. Bodies are parsed and prompts tokenised in threads of their own."""

        async def endpoint(request: Request) -> Response:
            notes, began = request.scope["notes"], time.perf_counter()

            def read(raw: bytes) -> Call:
                body = parse_json(raw)
                if self._options.log_prompts:
                    notes["body"] = body
                return make(body, self._served, request.scope["request_id"])

            try:
                with self._service.arrival() as count:
                    call = await self._service.read(read, await self._body(request, count))
                    await self._service.compile(call)
            except Exception as error:
                notes["error"] = error_note(error)
                if self._options.traces is not None:
                    duration_s = time.perf_counter() - began
                    self._options.traces.record(None, request.scope["path"], request.headers, (), error, duration_s)
                return error_response(form, error)
            return CallResponse(self._service, call, form, notes, self._options.traces)

        return endpoint

    async def tokenize(self, request: Request) -> Response:
        def answer(raw: bytes) -> bytes:
            return large_json_bytes(tokenize(parse_json(raw), self._served))

        try:
            with self._service.arrival() as count:
                body = await self._service.read(answer, await self._body(request, count))
        except Exception as error:
            return error_response(TGI, error)
        return Response(body, media_type="application/json")

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card(name) for name in self._served.names]})

    async def model(self, request: Request) -> Response:
        try:
            return json_response(self._card(self._served.check_name(request.path_params["name"])))
        except ProtocolError as error:
            return error_response(OPENAI, error)

    async def info(self, request: Request) -> Response:
        """TGI's."""
        limits, spec = self._served.limits, self._service.engine.engine.spec
        return json_response({
            "model_id": self._served.names[0],
            "model_sha": None,
            "model_dtype": str(spec.dtype),
            "model_device_type": spec.device.type,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": self._service.max_open,
            "max_best_of": limits.max_n,
            "max_stop_sequences": limits.max_stop,
            "max_input_tokens": self._served.max_prompt_tokens,
            "max_input_length": self._served.max_prompt_tokens,
            "max_total_tokens": self._served.max_model_len,
            "router": "paged-core",
            "version": __version__,
            "sha": None,
            "docker_label": None,
        })  # fmt: skip

    async def openapi(self, request: Request) -> Response:
        """All routes, and what their bodies may hold."""
        if self._document is None:
            with_keys = bool(self._options.api_keys)
            routes = request.app.routes
            self._document = await run_in_threadpool(openapi, routes, self._served, with_keys=with_keys)
        return json_response(self._document)

    async def health(self, request: Request) -> Response:
        """Whether the process does its work: if not, restart it."""
        return self._status(self._service.trouble)

    async def ready(self, request: Request) -> Response:
        """Whether it takes calls: if not, send them elsewhere."""
        return self._status(None if self._service.ready else "the server takes no more calls")

    async def metrics(self, request: Request) -> Response:
        if self._metrics is None:
            return error_response(TGI, CallError(Failure.NOT_FOUND, "this server keeps no metrics"))
        body, content_type = self._metrics.render()
        return Response(body, headers={"content-type": content_type})

    def _status(self, bad: str | None) -> Response:
        return Response(status_code=200) if bad is None else error_response(TGI, CallError(Failure.UNAVAILABLE, bad))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "paged-core",
            "root": self._served.names[0],
            "max_model_len": self._served.max_model_len,
        }

    async def _body(self, request: Request, count: Callable[[int], None]) -> bytes:
        """Raises CallError for a body that is too large or comes too slowly. ``count`` is told of its bytes."""
        limit, timeout_s = self._options.max_body_bytes, self._options.body_timeout_s
        try:
            return await asyncio.wait_for(_read(request, limit, count), timeout_s)
        except asyncio.TimeoutError:
            raise CallError(Failure.TOO_SLOW, f"the body did not come in {timeout_s:g} s") from None
        except ClientDisconnect:
            raise CallError(Failure.CUT, "the client left") from None


async def _read(request: Request, limit: int, count: Callable[[int], None]) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        count(len(part))
        if size > limit:
            raise CallError(Failure.TOO_LARGE, f"the body has more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _tgi(stream: bool | None) -> _MakeCall:
    return lambda body, served, request_id: TGICall(body, served, stream)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]  # request.url is made of the Host header, which may be anything
    form = form_of(path)
    if error.status_code == 405:
        response = error_response(form, CallError(Failure.NOT_ALLOWED, f"{request.method} is not for {path}"))
        response.headers.update(error.headers or {})  # which methods are
        return response
    return error_response(form, CallError(Failure.NOT_FOUND, f"there is nothing at {path}"))
