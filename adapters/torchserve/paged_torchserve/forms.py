"""ReplyFormat: how a protocol's answers, events and errors are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from paged_serving import LAST_EVENT, as_event, event_bytes, json_bytes, openai_error, tgi_error

JSON, PLAIN, EVENTS = "application/json", "text/plain; charset=utf-8", "text/event-stream; charset=utf-8"
LINES = "application/x-ndjson"


class ReplyFormat(NamedTuple):
    error: Callable[[Exception], tuple[int, dict[str, Any]]]
    content_type: str
    stream_type: str
    answer: Callable[[Any], bytes]
    event: Callable[[Any], bytes]
    late_error: Callable[[bytes], bytes]  # an error, in JSON already, after events
    last_event: bytes


def _as_line(told: bytes) -> bytes:
    return b"\n" + told + b"\n"


def _json_line(value: Any) -> bytes:
    return json_bytes(value) + b"\n"


OPENAI = ReplyFormat(openai_error, JSON, EVENTS, json_bytes, event_bytes, as_event, LAST_EVENT)
TGI = ReplyFormat(tgi_error, JSON, EVENTS, json_bytes, event_bytes, as_event, b"")
TEXT = ReplyFormat(tgi_error, PLAIN, PLAIN, str.encode, str.encode, _as_line, b"")
TEXTS = ReplyFormat(tgi_error, JSON, PLAIN, json_bytes, str.encode, _as_line, b"")  # a list, or another JSON value
JSON_LINES = ReplyFormat(tgi_error, JSON, LINES, json_bytes, _json_line, _as_line, b"")
