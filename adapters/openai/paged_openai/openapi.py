"""GET /openapi.json: our routes as an OpenAPI 3.1 document.

The routes are read from the application, and what bodies may hold from the classes that they are read with; only what
a route answers is written down here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from starlette.routing import BaseRoute, Route

from paged_core import __version__
from paged_openai.responses import ANTHROPIC, OPENAI, TGI, form_of
from paged_serving import (
    CallError,
    ChatBody,
    CompletionBody,
    CountBody,
    DetokenizeBody,
    Failure,
    MessagesBody,
    ResponsesBody,
    ServedModel,
    TGIBody,
    TokenizeBody,
    body_schema,
)

_JSON, _EVENTS = "application/json", "text/event-stream"


class _Body(NamedTuple):
    """What a route takes."""

    declared: type[Any]
    media_types: tuple[str, ...] = (_JSON, _EVENTS)  # of the answer
    one_of: tuple[str, ...] = ()  # fields of which one must be there


_BODIES = {
    "/v1/completions": _Body(CompletionBody),
    "/v1/chat/completions": _Body(ChatBody),
    "/v1/responses": _Body(ResponsesBody),
    "/v1/messages": _Body(MessagesBody),
    "/v1/messages/count_tokens": _Body(CountBody, (_JSON,)),
    "/": _Body(TGIBody),
    "/generate": _Body(TGIBody, (_JSON,)),
    "/generate_stream": _Body(TGIBody, (_EVENTS,)),
    "/tokenize": _Body(TokenizeBody, (_JSON,), ("inputs", "prompt", "messages")),
    "/detokenize": _Body(DetokenizeBody, (_JSON,)),
}
_OTHER_MEDIA = {"/metrics": "text/plain", "/health": None, "/ping": None, "/ready": None}  # None: an empty answer
_ERRORS = {
    OPENAI: {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    ANTHROPIC: {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
    TGI: {
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
    },
}


_NAMES = {OPENAI: "openai_error", ANTHROPIC: "anthropic_error", TGI: "tgi_error"}


def openapi(routes: Iterable[BaseRoute], served: ServedModel, *, with_keys: bool) -> dict[str, Any]:
    """The document of all ``routes`` except those for people (``include_in_schema=False``)."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route) and route.include_in_schema:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                path = re.sub(r"{(\w+):\w+}", r"{\1}", route.path)
                paths.setdefault(path, {})[method.lower()] = _operation(method, path, served)
    components = {name: _ERRORS[form] for form, name in _NAMES.items()}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "paged-core", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(method: str, path: str, served: ServedModel) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": f"{method.lower()}{path}"}
    names = re.findall(r"{(\w+)}", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    body = _BODIES.get(path) if method == "POST" else None
    if body is not None:
        schema = body_schema(body.declared, served, one_of=body.one_of)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"] = {"200": _good(path, body), **_failures(path)}
    return operation


def _good(path: str, body: _Body | None) -> dict[str, Any]:
    media_types = body.media_types if body is not None else (_OTHER_MEDIA.get(path, "application/json"),)
    content: dict[str, Any] = {media: {} for media in media_types if media is not None}
    return {"description": "the answer", **({"content": content} if content else {})}


def _failures(path: str) -> dict[str, Any]:
    """Every status of an error, in the form of the route's protocol."""
    form = form_of(path)
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{_NAMES[form]}"}}}
    failures: dict[str, Any] = {}
    for failure in Failure:
        status = str(form.error(CallError(failure, ""))[0])
        told = failure.name.lower().replace("_", " ")
        known = failures.get(status)
        failures[status] = {"description": f"{known['description']}, {told}" if known else told, "content": content}
    return dict(sorted(failures.items()))
