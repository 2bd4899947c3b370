"""From what TorchServe hands over (the parts of a body, its headers) to a Call and the Form of its answer.

Stock text-generation handlers take texts in many wrappings and answer in plain text. Their parameters are those of
Hugging Face's ``generate``, as TGI has them: TGICall reads and checks them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from paged_core import GenerationOutput, StreamDelta
from paged_serving import (
    LAST_EVENT,
    Call,
    CallError,
    ChatCall,
    CompletionCall,
    Failure,
    ProtocolError,
    ServedModel,
    TGICall,
    as_event,
    event_bytes,
    json_bytes,
    openai_error,
    parse_json,
    tgi_error,
)
from paged_torchserve.settings import Settings

Parts = Mapping[str, Any]  # name -> value: dict, list or str where TorchServe has decoded it, else bytes
_MakeCall = Callable[[Any, ServedModel, str], Call]

JSON, PLAIN, EVENTS = "application/json", "text/plain; charset=utf-8", "text/event-stream; charset=utf-8"
_PROMPTS = ("prompt", "data", "text")  # where stock handlers look for the prompt
_NO_DETAILS = ("details", "decoder_input_details", "top_n_tokens")  # what an answer in plain text can't hold


class Form(NamedTuple):
    """How a protocol's answers, events and errors are written."""

    error: Callable[[Exception], tuple[int, dict[str, Any]]]
    content_type: str
    stream_type: str
    answer: Callable[[Any], bytes]
    event: Callable[[Any], bytes]
    late_error: Callable[[bytes], bytes]  # an error, in JSON already, after events
    last_event: bytes


class FrontendRequest(NamedTuple):
    """One request as TorchServe hands it over."""

    id: str
    parts: Parts  # empty when it has been handed over before
    headers: Mapping[str, Any]

    @property
    def route(self) -> str:
        """What follows the model's version in the URL."""
        return str(self.headers.get("url_path") or "").strip("/")

    @property
    def is_orphan(self) -> bool:
        """Whether another worker, gone since, has been given the body: the frontend hands it over only once."""
        lengths = [value for name, value in self.headers.items() if name.lower() == "content-length"]
        return not self.parts and lengths not in ([], ["0"])


def _as_line(told: bytes) -> bytes:
    return b"\n" + told + b"\n"


OPENAI = Form(openai_error, JSON, EVENTS, json_bytes, event_bytes, as_event, LAST_EVENT)
TGI = Form(tgi_error, JSON, EVENTS, json_bytes, event_bytes, as_event, b"")
TEXT = Form(tgi_error, PLAIN, PLAIN, str.encode, str.encode, _as_line, b"")
TEXTS = Form(tgi_error, JSON, PLAIN, json_bytes, str.encode, _as_line, b"")

_ROUTES: Mapping[str, tuple[_MakeCall, Form]] = {
    "v1/completions": (CompletionCall, OPENAI),
    "v1/chat/completions": (ChatCall, OPENAI),
    "generate": (lambda body, served, request_id: TGICall(body, served, False), TGI),
    "generate_stream": (lambda body, served, request_id: TGICall(body, served, True), TGI),
}


def error_form(request: FrontendRequest) -> Form:
    """The Form for what is wrong with ``request`` before it has been read."""
    if request.route.startswith("v1"):
        return OPENAI
    return TGI if request.route else TEXT


def read_call(request: FrontendRequest, served: ServedModel, settings: Settings) -> tuple[Call, Form]:
    """
    Raises:
        CallError, ProtocolError: it can't be served.
    """
    if request.is_orphan:
        raise CallError(
            Failure.CUT,
            "there is nothing in the body that TorchServe could read (JSON needs the content type application/json); "
            "or the worker that had begun to answer was stopped: ask again",
        )
    _check_unicode(request.parts)
    if request.headers.get("explain") == "True":
        raise CallError(Failure.NOT_FOUND, "texts have no explanations here; use /predictions")
    if not request.route:
        return _read_plain(request.parts, served, settings)
    if request.route not in _ROUTES:
        told = f"there is nothing at {request.route}; there are {', '.join(_ROUTES)}"
        raise CallError(Failure.NOT_FOUND, told)
    make, form = _ROUTES[request.route]
    body = request.parts.get("body")
    return make(body if isinstance(body, dict) else parse_json(_bytes(body)), served, request.id), form


class PlainCall:
    """Prompts in plain text, answered in plain text; see paged_core's Call for its members."""

    def __init__(
        self, prompts: Sequence[str], parameters: Mapping[str, Any], stream: bool, served: ServedModel
    ) -> None:
        most = served.limits.max_prompts
        if len(prompts) > most:
            raise ProtocolError(f"there are {len(prompts)} prompts; the limit is {most} in one request", "prompt")
        for name in _NO_DETAILS:
            if parameters.get(name):
                raise ProtocolError(f"{name} needs an answer in JSON; send {{inputs, parameters}}", name)
        if stream and len(prompts) > 1:
            raise ProtocolError("one prompt at a time can be streamed", "stream")
        self._calls = [TGICall({"inputs": text, "parameters": parameters}, served, False) for text in prompts]
        if stream and self._calls[0].params.n > 1:
            raise ProtocolError("best_of above 1 can't be streamed: the best is known at the end", "best_of")
        self.prompts = [prompt for call in self._calls for prompt in call.prompts]
        self.params, self.grammar = self._calls[0].params, self._calls[0].grammar
        self.stream = stream
        self._opening = prompts[0] if parameters.get("return_full_text") else ""

    def first_chunks(self) -> list[Any]:
        return [self._opening] if self._opening else []

    def chunks(self, number: int, delta: StreamDelta) -> list[Any]:
        return [delta.text]

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[Any]:
        return []

    def answer(self, results: Sequence[GenerationOutput]) -> list[str]:
        return [call.answer([result])["generated_text"] for call, result in zip(self._calls, results, strict=True)]


class _OneText(PlainCall):
    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        return super().answer(results)[0]


def _read_plain(parts: Parts, served: ServedModel, settings: Settings) -> tuple[Call, Form]:
    fields: dict[str, Any] = {name: _field(value) for name, value in parts.items() if name != "body"}
    value = _body(parts["body"]) if "body" in parts else None
    if isinstance(value, Mapping):
        fields |= value
    elif value is not None:
        fields["data"] = value
    while isinstance(fields.get("data"), Mapping):
        fields |= fields.pop("data")
    if isinstance(fields.get("inputs"), str):
        return TGICall(fields, served, None), TGI
    prompts = _take_prompts(fields)
    stream = fields.pop("stream", None) or False
    if not isinstance(stream, bool):
        raise ProtocolError("stream must be true or false", "stream")
    parameters = _parameters(fields, settings)
    if isinstance(prompts, str):
        return _OneText([prompts], parameters, stream, served), TEXT
    return PlainCall(prompts, parameters, stream, served), TEXTS


def _check_unicode(parts: Parts) -> None:
    """TorchServe decodes JSON itself, and lets halves of surrogate pairs pass, which no tokenizer takes."""
    for name, value in parts.items():
        if not isinstance(value, bytes | bytearray):
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ProtocolError(f"the body isn't Unicode: {error.reason}", "body") from None


def _take_prompts(fields: dict[str, Any]) -> str | list[str]:
    for name in (*_PROMPTS, "inputs"):
        value = fields.pop(name, None)
        if value is None:
            continue
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            return value
        raise ProtocolError(f"{name} must be a string or a list of strings", name)
    raise ProtocolError("there is no prompt; send text, or JSON with prompt or inputs", "prompt")


def _parameters(fields: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Stock handlers take parameters in an object of their own, or beside the prompt."""
    inner = fields.pop("parameters", None) or {}
    if not isinstance(inner, Mapping):
        raise ProtocolError("parameters must be a JSON object", "parameters")
    parameters = {**fields, **inner}
    if "max_tokens" in parameters:
        parameters.setdefault("max_new_tokens", parameters.pop("max_tokens"))
    defaults = {"max_new_tokens": settings.max_new_tokens, "return_full_text": settings.return_full_text}
    return {**defaults, **parameters}


def _body(value: Any) -> Any:
    """A body as JSON if that is what it is, else as text."""
    if not isinstance(value, bytes | bytearray):
        return value
    text = _text(value)
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            return parse_json(bytes(value))
        except ProtocolError:
            return text  # text may begin so too
    return text


def _field(value: Any) -> Any:
    """A form's field: all are text; what reads as a JSON number, truth value or object is taken for it."""
    text = _text(value) if isinstance(value, bytes | bytearray) else value
    if not isinstance(text, str):
        return text
    try:
        found = parse_json(text.encode())
    except ProtocolError:
        return text
    return text if isinstance(found, str) else found


def _bytes(body: Any) -> bytes:
    """An undecoded body, for a route that takes JSON."""
    if isinstance(body, bytes | bytearray):
        return bytes(body)
    return body.encode() if isinstance(body, str) else json_bytes(body)


def _text(value: bytes | bytearray) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise ProtocolError("the body is neither text (UTF-8) nor JSON", "body") from None
