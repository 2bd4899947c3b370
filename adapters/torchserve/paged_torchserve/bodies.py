"""From TorchServe's parts of a body and its headers to a Call and the ReplyFormat of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from paged_serving import (
    Call,
    CallError,
    ChatCall,
    CompletionCall,
    Failure,
    ProtocolError,
    ServedModel,
    TGICall,
    json_bytes,
    parse_json,
)
from paged_torchserve.forms import OPENAI, TEXT, TEXTS, TGI, ReplyFormat
from paged_torchserve.kserve import infer_call, infer_form, kserve_call
from paged_torchserve.models_list import ModelList
from paged_torchserve.plain import plain_call, read_fields
from paged_torchserve.requests import Carrier, FrontendRequest, Parts
from paged_torchserve.target import Target

_MakeCall = Callable[[Any, ServedModel, str], Call]

_ROUTES: Mapping[str, tuple[_MakeCall, ReplyFormat]] = {
    "v1/completions": (CompletionCall, OPENAI),
    "v1/chat/completions": (ChatCall, OPENAI),
    "generate": (lambda body, served, request_id: TGICall(body, served, False), TGI),
    "generate_stream": (lambda body, served, request_id: TGICall(body, served, True), TGI),
}
_MODELS = "v1/models"
_NO_FIELD = (
    "TorchServe reads this body as a form, and there is no field in it: name the text's type (curl -H 'content-type: "
    "text/plain' -d ...), or send it as a field (curl -d 'data=...')"
)


def error_form(request: FrontendRequest, target: Target) -> ReplyFormat:
    """The ReplyFormat of errors before ``request`` has been read."""
    if request.carrier is Carrier.TENSORS:
        return infer_form(request.body, target)
    if request.route.startswith("v1"):
        return OPENAI
    return TGI if request.route else TEXT


def read_call(request: FrontendRequest, target: Target) -> tuple[Call, ReplyFormat]:
    """
    Raises:
        CallError, ProtocolError: it can't be served.
    """
    _check_body(request)
    if request.carrier is Carrier.TENSORS:
        return infer_call(request.body, target), infer_form(request.body, target)
    if request.headers.get("explain") == "True":
        raise CallError(Failure.NOT_FOUND, "texts have no explanations here; use /predictions")
    if not request.route:
        return _read_routeless(request, target)
    if request.route == _MODELS:
        return ModelList(target.served), OPENAI
    if request.route not in _ROUTES:
        told = f"there is nothing at {request.route}; there are {', '.join([*_ROUTES, _MODELS])}"
        raise CallError(Failure.NOT_FOUND, told)
    make, form = _ROUTES[request.route]
    body = request.body
    return make(body if isinstance(body, dict) else parse_json(_bytes(body)), target.served, request.id), form


def _read_routeless(request: FrontendRequest, target: Target) -> tuple[Call, ReplyFormat]:
    fields = read_fields(request.parts)
    if "messages" in fields:
        return ChatCall(fields, target.served, request.id), OPENAI
    if isinstance(fields.get("inputs"), str):
        return TGICall(fields, target.served, None), TGI
    if (kserve := kserve_call(fields, request.id, target)) is not None:
        return kserve, TEXTS
    return plain_call(fields, target)


def _check_body(request: FrontendRequest) -> None:
    if request.is_orphan:
        raise CallError(Failure.CUT, "the worker that had begun to answer was stopped: ask again")
    if request.lost_its_body:
        raise ProtocolError(_NO_FIELD if request.is_form else "there is nothing in the body", "body")
    _check_unicode(request.parts)


def _check_unicode(parts: Parts) -> None:
    """Refuses lone surrogates, which TorchServe's JSON decoder lets pass and no tokenizer takes."""
    for name, value in parts.items():
        if not isinstance(value, bytes | bytearray):
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ProtocolError(f"the body isn't Unicode: {error.reason}", "body") from None


def _bytes(body: Any) -> bytes:
    """An undecoded body, for a route that takes JSON."""
    if isinstance(body, bytes | bytearray):
        return bytes(body)
    return body.encode() if isinstance(body, str) else json_bytes(body)
