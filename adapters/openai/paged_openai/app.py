"""The routes: which path speaks which protocol. Everything behind them is in Service and paged_serving's calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paged_openai.about import About
from paged_openai.counts import RouteCounts
from paged_openai.endpoints import BodyLimits, Endpoints, MakeCall
from paged_openai.keys import KeyCheck
from paged_openai.logs import RequestLog
from paged_openai.origins import OriginCheck
from paged_openai.page import Page
from paged_openai.prefixes import PathPrefix
from paged_openai.responses import ANTHROPIC, OPENAI, OPENAI_WITHOUT_DONE, RESPONSES, TGI, error_response, form_of
from paged_openai.service import Service
from paged_openai.slashes import OptionalSlash
from paged_openai.stored import StoredResponses
from paged_openai.tracing import Traces
from paged_openai.unread import CloseUnread
from paged_serving import (
    CallError,
    ChatBody,
    ChatCall,
    CompletionBody,
    CompletionCall,
    CountBody,
    DetokenizeBody,
    Failure,
    MessagesBody,
    MessagesCall,
    PrometheusMetrics,
    ResponsesBody,
    ResponsesCall,
    ResponseStore,
    TGIBody,
    TGICall,
    TokenizeBody,
    count_tokens,
    detokenize,
    tokenize,
)

_FOR_OTHER_MODELS = (
    "/v1/embeddings", "/embed", "/pooling", "/classify", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score",
)  # fmt: skip


@dataclass(frozen=True)
class AppOptions:
    """The options of the application."""

    api_keys: tuple[str, ...] = ()  # none: everybody is let in
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2 * 2**20
    body_timeout_s: float = 30.0
    tgi_chat_stream: bool = False  # stream chats in the form of TGI's clients instead of OpenAI's
    log_prompts: bool = False
    page: bool = True  # for browsers
    max_stored_responses: int = 1000  # that later ones may go on from
    root_path: str = ""  # path under which a proxy serves us, such as /llm
    traces: Traces | None = None


def create_app(service: Service, metrics: PrometheusMetrics | None, options: AppOptions | None = None) -> Starlette:
    """The ASGI application."""
    options = options or AppOptions()
    limits = BodyLimits(options.max_body_bytes, options.body_timeout_s)
    endpoints = Endpoints(service, limits, options.traces, log_prompts=options.log_prompts)
    store = ResponseStore(options.max_stored_responses)
    about = About(service, metrics, with_keys=bool(options.api_keys))
    routes = [
        *_calls(endpoints, options, store),
        *StoredResponses(store).routes,
        *_facts(about),
        *(_page_routes(service, metrics) if options.page else ()),
    ]
    app = Starlette(
        routes=routes,
        middleware=_middleware(options, None if metrics is None else RouteCounts(metrics, routes)),
        exception_handlers={HTTPException: _no_such_route},
    )
    app.router.redirect_slashes = False  # a redirect would send the client to the address in its Host header
    return app


def _calls(endpoints: Endpoints, options: AppOptions, store: ResponseStore) -> list[Route]:
    """Routes that read a body."""
    chat: MakeCall = ChatCall
    chat_form = OPENAI
    if options.tgi_chat_stream:
        chat, chat_form = partial(ChatCall, whole_deltas=True), OPENAI_WITHOUT_DONE
    at = {
        "/v1/completions": endpoints.call(CompletionCall, CompletionBody, OPENAI),
        "/v1/chat/completions": endpoints.call(chat, ChatBody, chat_form),
        "/v1/responses": endpoints.call(partial(ResponsesCall, store=store), ResponsesBody, RESPONSES),
        "/v1/messages": endpoints.call(MessagesCall, MessagesBody, ANTHROPIC),
        "/v1/messages/count_tokens": endpoints.answer(count_tokens, CountBody, ANTHROPIC),
        "/": endpoints.call(_tgi(None), TGIBody, TGI),
        "/generate": endpoints.call(_tgi(False), TGIBody, TGI),
        "/generate_stream": endpoints.call(_tgi(True), TGIBody, TGI),
        "/tokenize": endpoints.answer(tokenize, TokenizeBody, TGI),
        "/detokenize": endpoints.answer(detokenize, DetokenizeBody, TGI),
    }
    return [Route(path, endpoint, methods=["POST"]) for path, endpoint in at.items()]


def _facts(about: About) -> list[Route]:
    return [
        *(Route(path, about.nothing, methods=["POST"], include_in_schema=False) for path in _FOR_OTHER_MODELS),
        Route("/v1/models", about.models),
        Route("/v1/models/{name:path}", about.model),
        Route("/info", about.info),
        Route("/version", about.version),
        Route("/load", about.load),
        Route("/openapi.json", about.openapi),
        Route("/health", about.health),
        Route("/ping", about.health, methods=["GET", "POST"]),  # SageMaker's
        Route("/ready", about.ready),
        Route("/metrics", about.metrics),
    ]


def _middleware(options: AppOptions, counts: RouteCounts | None) -> list[Middleware]:
    middleware = [
        Middleware(CloseUnread),
        Middleware(PathPrefix, prefix=options.root_path),
        Middleware(OptionalSlash),
        Middleware(RequestLog, counts=counts),
    ]
    if options.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "x-ignored-fields"],
            )
        )  # fmt: skip
    if options.api_keys:
        middleware.append(Middleware(KeyCheck, keys=options.api_keys))
    else:
        middleware.append(Middleware(OriginCheck, origins=options.cors_origins))
    return middleware


def _page_routes(service: Service, metrics: PrometheusMetrics | None) -> list[Route]:
    page = Page(service, metrics)
    return [Route("/", page.page, include_in_schema=False), Route("/live", page.live, include_in_schema=False)]


def _tgi(stream: bool | None) -> MakeCall:
    return lambda body, served, request_id: TGICall(body, served, stream)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]  # not request.url, which contains the client's Host header
    form = form_of(path)
    if error.status_code == 405:
        response = error_response(form, CallError(Failure.NOT_ALLOWED, f"{request.method} is not for {path}"))
        response.headers.update(error.headers or {})  # which methods are
        return response
    return error_response(form, CallError(Failure.NOT_FOUND, f"there is nothing at {path}"))
