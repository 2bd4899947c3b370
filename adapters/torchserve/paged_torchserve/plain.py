"""Plain requests: prompts in the forms of stock text-generation handlers, answered as the archive's settings say.

Their parameters are those of Hugging Face's ``generate``, as TGI has them: TGICall reads and checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import GenerationOutput, StreamDelta
from paged_serving import ProtocolError, ServedModel, TGICall, parse_json
from paged_torchserve.forms import JSON_LINES, TEXT, TEXTS, ReplyFormat
from paged_torchserve.requests import Parts
from paged_torchserve.settings import SAMPLING
from paged_torchserve.target import Target

PROMPTS = ("prompt", "data", "text", "inputs")  # where stock handlers look for the prompt
_NO_FIELDS = ("body", "url_path", "model_name")  # parts that say where a request goes, or hold all of it
_NO_DETAILS = ("details", "decoder_input_details", "top_n_tokens")  # what an answer in plain text can't hold


class PlainCall:
    """Prompts and parameters, answered by a list of texts; see paged_serving's Call for its members."""

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
        self.stream, self.retells, self.named = stream, False, self._calls[0].named
        self._opening = prompts[0] if parameters.get("return_full_text") else ""

    def first_chunks(self) -> list[Any]:
        return [self._opening] if self._opening else []

    def chunks(self, number: int, delta: StreamDelta) -> list[Any]:
        return [delta.text]

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[Any]:
        return []

    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        return self.texts(results)

    def texts(self, results: Sequence[GenerationOutput]) -> list[str]:
        return [call.answer([result])["generated_text"] for call, result in zip(self._calls, results, strict=True)]


class _OneText(PlainCall):
    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        return self.texts(results)[0]


class _OneObject(PlainCall):
    def first_chunks(self) -> list[Any]:
        return [{"text": chunk} for chunk in super().first_chunks()]

    def chunks(self, number: int, delta: StreamDelta) -> list[Any]:
        return [{"text": delta.text}]

    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        return {"text": self.texts(results)[0]}


_SHAPES: Mapping[str, tuple[type[PlainCall], ReplyFormat]] = {  # settings.reply -> how one prompt is answered
    "text": (_OneText, TEXT),
    "json": (_OneObject, JSON_LINES),
    "list": (PlainCall, TEXTS),
}


def read_fields(parts: Parts) -> dict[str, Any]:
    """The fields of a request, whether they came as JSON, as a form, or as one text (which is ``data`` then)."""
    fields = {name: _field(name, value) for name, value in parts.items() if name not in _NO_FIELDS}
    value = _body(parts["body"]) if "body" in parts else None
    if isinstance(value, Mapping):
        fields |= value
    elif value is not None:
        fields["data"] = value
    while isinstance(fields.get("data"), Mapping):
        fields |= fields.pop("data")
    return fields


def plain_call(fields: dict[str, Any], target: Target) -> tuple[PlainCall, ReplyFormat]:
    """The call that ``fields`` ask for. They are used up.

    Raises:
        ProtocolError: they can't be served.
    """
    prompts = _take_prompts(fields)
    stream = fields.pop("stream", None)
    if not isinstance(stream, bool | None):
        raise ProtocolError("stream must be true or false", "stream")
    alone = isinstance(prompts, str)
    if stream is None:
        stream = alone and target.settings.defaults.get("stream", False)
    listed = [prompts] if isinstance(prompts, str) else prompts
    parameters = take_parameters(fields, target, listed)
    make, form = _SHAPES[target.settings.reply] if alone else (PlainCall, TEXTS)
    return make(listed, parameters, stream, target.served), form


def take_parameters(fields: dict[str, Any], target: Target, prompts: Sequence[str]) -> dict[str, Any]:
    """The parameters in ``fields``, over the archive's defaults. Stock handlers take parameters in an object, or next
    to the prompt."""
    parameters = {**fields}
    for name in ("parameters", "params"):
        inner = parameters.pop(name, None) or {}
        if not isinstance(inner, Mapping):
            raise ProtocolError(f"{name} must be a JSON object", name)
        parameters |= inner
    if "max_tokens" in parameters:
        parameters.setdefault("max_new_tokens", parameters.pop("max_tokens"))
    idle = {"stream", *(SAMPLING if parameters.get("do_sample") is False else ())}
    defaults = {name: value for name, value in target.settings.defaults.items() if name not in idle}
    parameters = {**defaults, "return_full_text": target.settings.return_full_text, **parameters}
    longest = parameters.pop("max_length", None)
    if longest is not None:
        parameters.setdefault("max_new_tokens", _rest(longest, prompts, target))
    return {"max_new_tokens": target.settings.max_new_tokens, **parameters}


def _rest(max_length: Any, prompts: Sequence[str], target: Target) -> int:
    """New tokens until ``max_length`` of prompt and answer together, as generate() counts them."""
    if type(max_length) is not int:
        raise ProtocolError("max_length must be an integer", "max_length")
    lengths = {len(target.served.encode(prompt).token_ids) for prompt in prompts}
    if len(lengths) > 1:
        raise ProtocolError("prompts of several lengths can't share a max_length; say max_new_tokens", "max_length")
    (length,) = lengths
    if length >= max_length:
        told = f"the prompt has {length} tokens, and prompt and answer together may have {max_length} (max_length)"
        raise ProtocolError(f"{told}; say max_new_tokens", "max_length")
    return max_length - length


def as_text(value: bytes | bytearray) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise ProtocolError("the body is neither text (UTF-8) nor JSON", "body") from None


def _take_prompts(fields: dict[str, Any]) -> str | list[str]:
    for name in PROMPTS:
        value = fields.pop(name, None)
        if value is None:
            continue
        if isinstance(value, str):
            return value
        if _is_texts(value):
            return list(value)
        raise ProtocolError(f"{name} must be a string or a list of strings", name)
    raise ProtocolError("there is no prompt; send text, or JSON with prompt or inputs", "prompt")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _body(value: Any) -> Any:
    """A body as JSON if it is JSON, else as text."""
    if not isinstance(value, bytes | bytearray):
        return value
    text = as_text(value)
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            return parse_json(bytes(value))
        except ProtocolError:
            return text  # text may begin so too
    return text


def _field(name: str, value: Any) -> Any:
    """A form's field: all are text. JSON numbers, booleans and objects are parsed, except in a prompt's own field:
    there 2024 is a text, and only an object or a list of texts is parsed."""
    text = as_text(value) if isinstance(value, bytes | bytearray) else value
    if not isinstance(text, str):
        return text
    try:
        found = parse_json(text.encode())
    except ProtocolError:
        return text
    if name in PROMPTS and not (isinstance(found, Mapping) or _is_texts(found)):
        return text
    return text if isinstance(found, str) else found
